"""What becomes of an epoch: groups, strata and times on their sides, classes in balance, tags in their shares."""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import write_jsonl, write_recipe
from tests.prepared import PARTS
from tunesmith.conversation.message import Conversation, Message
from tunesmith.data.split import drawn
from tunesmith.errors import DataError
from tunesmith.runs import read_jsonl

SPLIT = {"validation": 0.2, "test": 0.2}


def rows(n: int, **columns: Any) -> list[dict[str, Any]]:
    """Rows with a question each; a column is a function of the row's number."""
    return [
        {"prompt": f"Question {i}?", "completion": "ab"[i % 2]} | {k: f(i) for k, f in columns.items()}
        for i in range(n)
    ]


def values(made: Any, part: str, read: list[dict[str, Any]], column: str) -> list[Any]:
    """What a column holds in the rows of a part, as they were written before the stage read them from a JSONL file."""
    return [read[int(row.id.rpartition(":")[2]) - 1][column] for row in made.parts[part]]


# ------------------------------------------------------------------ splits


def test_a_group_is_on_one_side(prepared: Any, tmp_path: Path) -> None:
    asked = rows(120, customer=lambda i: i % 17 if i % 10 else None)
    path = str(write_jsonl(tmp_path / "a.jsonl", asked))
    made = prepared(path, split={**SPLIT, "by": "customer"})
    sides = [set(values(made, part, asked, "customer")) - {None} for part in PARTS]
    assert sum(map(len, sides)) == 17 == len(set.union(*sides))
    assert made.counts["test"] == 24 and made.counts["validation"] == 24
    with pytest.raises(DataError, match=r"data\.split\.by: no row has a column 'costumer'"):
        prepared(path, split={**SPLIT, "by": "costumer"})


@pytest.mark.parametrize(
    ("customer", "clean", "keep"),
    [
        ("customer{:02}@example.com", {"personal": {"action": "mask", "names": "none"}}, ["customer"]),
        ("customer{:02}@example.com", {"personal": {"action": "pseudonymise", "names": "none"}}, ["customer"]),
        ("customer{:02}@example.com", {"personal": {"action": "drop", "names": "none"}}, []),
        ("AKIAIOSFODNN7EXAMP{:02}", {"secrets": "mask"}, ["customer"]),
    ],
)
def test_a_group_stays_one_whatever_cleaning_makes_of_its_name(
    prepared: Any, tmp_path: Path, customer: str, clean: dict[str, Any], keep: list[str]
) -> None:
    asked = rows(60, customer=lambda i: customer.format(i % 12))
    path = str(write_jsonl(tmp_path / "a.jsonl", asked))
    split = {"validation": 5, "test": 10, "by": "customer"}
    made = prepared({"path": path, "keep": keep}, split=split, clean=clean)
    sides = [set(values(made, part, asked, "customer")) for part in PARTS]
    assert [len(side) for side in sides] == [9, 1, 2] and len(set.union(*sides)) == 12
    assert all("columns" not in row.metadata for part in PARTS for row in made.parts[part])
    for file in (tmp_path / "out").iterdir():
        assert not re.search(customer.partition("{")[0] + "[01]", file.read_text()), file.name


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_rows_without_a_group_are_on_their_own(prepared: Any, tmp_path: Path, form: str) -> None:
    """An empty cell of a table of text, and a number that is none, are no customer that many rows share."""
    asked = rows(40, customer=lambda i: None if i % 4 else i // 8)
    if form == "csv":
        lines = [f"{r['prompt']},{r['completion']},{'' if r['customer'] is None else r['customer']}" for r in asked]
        (tmp_path / "a.csv").write_text("\n".join(["prompt,completion,customer", *lines]))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        numbers = [float("nan") if row["customer"] is None else float(row["customer"]) for row in asked]
        columns = {name: [row[name] for row in asked] for name in ("prompt", "completion")}
        pq.write_table(pa.table(columns | {"customer": pa.array(numbers, pa.float64())}), tmp_path / "a.parquet")
    made = prepared(f"a.{form}", split={"validation": 10, "test": 10, "by": "customer"})
    assert [made.counts[part] for part in PARTS] == [20, 10, 10]
    number = {row["prompt"]: row["customer"] for row in asked}
    sides = [[number[row.question] for row in made.parts[part]] for part in PARTS]
    assert all(None in side for side in sides)
    assert sum(len(set(side) - {None}) for side in sides) == 5


def test_a_tag_that_is_personal_stays_a_tag(prepared: Any, tmp_path: Path) -> None:
    tags = {"ann@example.com": 0.75, "bob@example.com": 0.25}
    sources = []
    for tag in tags:
        path = write_jsonl(
            tmp_path / f"{tag[:3]}.jsonl", [r | {"prompt": f"{tag[:3]} {i}"} for i, r in enumerate(rows(30))]
        )
        sources.append({"path": str(path), "tag": tag})
    made = prepared(*sources, mix=tags, clean={"personal": {"action": "mask", "names": "none"}})
    assert {tag: told["rows"] for tag, told in made.told["mix"].items()} == {
        "ann@example.com": 30,
        "bob@example.com": 10,
    }


def test_a_group_is_on_one_side_of_given_files(prepared: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows(20, customer=lambda i: i // 2)))
    write_jsonl(tmp_path / "t.jsonl", [{"prompt": "Other?", "completion": "a", "customer": 3}])
    made = prepared(path, split={"validation": 0, "test": "t.jsonl", "by": "customer"})
    assert made.counts["train"] == 18 and made.counts["removed"] == {"in_test": 2}
    assert [r["why"] for r in made.removed] == ["has the same customer as a test row"] * 2


def test_strata(prepared: Any, tmp_path: Path) -> None:
    asked = rows(100, region=lambda i: "ns"[i % 10 == 0])
    path = str(write_jsonl(tmp_path / "a.jsonl", asked))
    made = prepared(path, split={**SPLIT, "stratify": "region"})
    for part, n in (("test", 20), ("validation", 20), ("train", 60)):
        assert Counter(values(made, part, asked, "region")) == {"n": n * 0.9, "s": n * 0.1}


@pytest.mark.parametrize("form", ["iso", "date", "number", "text number", "zones"])
def test_the_newest_are_the_test(prepared: Any, tmp_path: Path, form: str) -> None:
    def when(i: int) -> Any:
        day = datetime.datetime(2024, 1, 1) + datetime.timedelta(days=(i * 37) % 50)
        shapes = {"iso": day.isoformat(), "date": day.date().isoformat(), "number": (i * 37) % 50 + 0.5}
        shapes |= {"text number": str(shapes["number"]), "zones": day.isoformat() + ("Z" if i % 2 else "+02:00")}
        return shapes[form]

    asked = rows(50, at=when, day=lambda i: (i * 37) % 50)
    path = str(write_jsonl(tmp_path / "a.jsonl", asked))
    made = prepared(path, split={**SPLIT, "time": "at"})
    train, validation, test = (values(made, part, asked, "day") for part in PARTS)
    assert max(train) < min(validation) and max(validation) < min(test)
    assert (len(train), len(validation), len(test)) == (30, 10, 10)
    bad = [*rows(50, at=when), {"prompt": "x", "completion": "a", "at": "soon"}, {"prompt": "y", "completion": "a"}]
    made = prepared(str(write_jsonl(tmp_path / "a.jsonl", bad)), split={**SPLIT, "time": "at"}, max_rejected=0.1)
    assert [r["reason"] for r in made.rejected] == ["bad_time"] * 2


def test_what_was_asked_before_the_test_is_not_trained_on(prepared: Any, tmp_path: Path) -> None:
    asked = rows(20, at=lambda i: i)
    asked[3]["prompt"] = asked[19]["prompt"].upper()
    made = prepared(str(write_jsonl(tmp_path / "a.jsonl", asked)), split={"validation": 0, "test": 4, "time": "at"})
    assert made.counts["test"] == 4 and made.counts["removed"] == {"in_test": 1} and made.counts["train"] == 15


@settings(max_examples=40, deadline=None)
@given(groups=st.lists(st.integers(-1, 6), min_size=1, max_size=40), wanted=st.integers(0, 20), seed=st.integers(0, 9))
def test_groups_of_rows_that_are_alike_never_straddle(groups: list[int], wanted: int, seed: int) -> None:
    made = [Conversation((Message("user", str(i)), Message("assistant", "x")), f"f:{i}") for i in range(len(groups))]
    taken = drawn(made, wanted, seed, like=np.array(groups)).tolist()
    sides = [{group for group, out in zip(groups, taken, strict=True) if out == held} for held in (False, True)]
    assert not (sides[0] & sides[1]) - {-1} and sum(taken) <= wanted


WORDS = ("when", "comes", "the", "card", "that", "we", "ordered", "from", "that", "branch", "of", "yours")


def variants(n: int) -> list[dict[str, Any]]:
    """Questions of twelve words of their own, each asked in three ways: nine to ten of eleven runs are shared."""
    own = [" ".join(f"{word}{i}" for word in WORDS) for i in range(n)]
    ways = ("{}", "{} please", "Oh {}")
    return [{"prompt": way.format(q), "completion": f"{i}", "at": k} for i, q in enumerate(own)
            for k, way in enumerate(ways)]  # fmt: skip


def test_near_duplicates_never_straddle_drawn_parts(prepared: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", variants(30)))

    def sides(**split: Any) -> list[set[str]]:
        made = prepared(path, split={"validation": 18, "test": 18, **split})
        assert made.counts["test"] == made.counts["validation"] == 18
        assert made.told.get("split", {}) == ({"near": {"rows": 90, "groups": 30}} if "near" not in split else {})
        return [{row.answer for row in made.parts[part]} for part in PARTS]

    train, validation, test = sides()
    assert not train & test and not train & validation and not validation & test
    assert set.intersection(*sides(near=None)[::2])


def test_near_duplicates_never_straddle_given_files_or_times(prepared: Any, tmp_path: Path) -> None:
    asked = variants(30)
    path = str(write_jsonl(tmp_path / "a.jsonl", [row for row in asked if row["at"]]))
    write_jsonl(tmp_path / "t.jsonl", asked[:15:3])
    write_jsonl(tmp_path / "v.jsonl", asked[12:24:3])  # the first of these asks what the test asks
    made = prepared(path, split={"validation": "v.jsonl", "test": "t.jsonl"})
    assert {part: made.counts[part] for part in PARTS} == {"train": 44, "validation": 3, "test": 5}
    assert made.counts["removed"] == {"in_test": 11, "in_validation": 6}
    why = Counter(row["why"] for row in made.removed)
    assert why == {"asks nearly the same as a test row": 10, "asks nearly the same as a validation row": 6,
                   "asks the same as a test row": 1}  # fmt: skip
    by_time = prepared(str(write_jsonl(tmp_path / "b.jsonl", asked)), split={"validation": 0, "test": 10, "time": "at"})
    assert by_time.counts["test"] == 10 and by_time.counts["removed"] == {"in_test": 20}


def test_rows_of_one_template_are_not_alike(prepared: Any, tmp_path: Path) -> None:
    """Words that every row has say nothing of it; what stands in the template's gap decides."""
    template = " ".join(f"Rule {i} says {i * 7}." for i in range(30)) + " Now classify: {}"
    rows = [row | {"prompt": template.format(row["prompt"])} for row in variants(30) if row["at"] < 2]
    made = prepared(str(write_jsonl(tmp_path / "a.jsonl", rows)), split={"validation": 0, "test": 18})
    assert made.told["split"] == {"near": {"rows": 60, "groups": 30}} and made.counts["test"] == 18


def test_a_part_that_came_out_small_is_told(prepared: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", rows(40, customer=lambda i: 0)))
    made = prepared(path, split={"validation": 0, "test": 10, "by": "customer"})
    assert made.told["split"]["short"] == {"test": {"asked for": 10, "rows": 0}}


# ------------------------------------------------------------------ balance


def unbalanced(tmp_path: Path) -> str:
    answers = ["a"] * 60 + ["b"] * 13 + ["c"] * 2
    return str(write_jsonl(tmp_path / "u.jsonl", [
        {"prompt": f"Question {i}?", "completion": answer} for i, answer in enumerate(answers)]))  # fmt: skip


@pytest.mark.parametrize(
    ("balance", "sizes"),
    [
        ({}, {"a": 60, "b": 60, "c": 20}),
        ({"cap": 3}, {"a": 60, "b": 39, "c": 6}),
        ({"cap": 100}, {"a": 60, "b": 60, "c": 60}),
        ({"how": "drop"}, {"a": 2, "b": 2, "c": 2}),
        ({"how": "count", "rows": 20}, {"a": 20, "b": 20, "c": 20}),
    ],
)
def test_balance(prepared: Any, tmp_path: Path, balance: Any, sizes: dict[str, int]) -> None:
    path = unbalanced(tmp_path)
    made = prepared(path, balance=balance)
    assert Counter(row.answer for row in made.parts["train"]) == sizes
    times = Counter(row.id.partition("*")[0] for row in made.parts["train"])
    for answer in sizes:  # no row is there twice before every other is there once
        of = [times[row.id] for row in made.parts["train"] if row.answer == answer and "*" not in row.id]
        assert max(of) - min(of) <= 1
    assert len({row.id for row in made.parts["train"]}) == sum(sizes.values())
    assert prepared(path, balance=balance).parts == made.parts
    held = prepared(path, balance=balance, split=SPLIT)
    assert not any("*" in row.id for part in ("validation", "test") for row in held.parts[part])


def test_weights_are_scikit_learns(prepared: Any, tmp_path: Path) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    made = prepared(unbalanced(tmp_path), balance={"how": "weight", "cap": 1000})
    answers = [row.answer for row in made.parts["train"]]
    expected = dict(zip("abc", compute_class_weight("balanced", classes=np.array(list("abc")), y=answers), strict=True))
    assert {row.answer: row.messages[-1].weight for row in made.parts["train"]} == pytest.approx(expected)
    capped = prepared(unbalanced(tmp_path), balance={"how": "weight", "cap": 2})
    assert sorted({row.messages[-1].weight for row in capped.parts["train"]}) == pytest.approx([0.5, 75 / 39, 2.0])


# ------------------------------------------------------------------ mixing


def tagged(tmp_path: Path, **sizes: int) -> list[dict[str, Any]]:
    for tag, n in sizes.items():
        write_jsonl(tmp_path / f"{tag}.jsonl", [{"prompt": f"{tag} {i}", "completion": f"x{i}"} for i in range(n)])
    return [{"path": f"{tag}.jsonl", "tag": tag} for tag in sizes]


@pytest.mark.parametrize(("general", "expected"), [(500, 25), (25, 25), (10, 25), (1, 25)])
def test_mix_is_exact_to_the_row(prepared: Any, tmp_path: Path, general: int, expected: int) -> None:
    sources = tagged(tmp_path, mine=100, general=general)
    made = prepared(*sources, mix={"mine": 0.8, "general": 0.2})
    of = Counter(row.metadata["tag"] for row in made.parts["train"])
    assert of == {"mine": 100, "general": expected}
    times = Counter(row.id.partition("*")[0] for row in made.parts["train"])
    assert all(times[f"mine.jsonl:{i}"] == 1 for i in range(1, 101))
    of_general = [n for name, n in times.items() if name.startswith("general")]
    assert max(of_general) - min(of_general) <= 1
    assert made.counts["removed"] == ({"mix": general - 25} if general > 25 else {})
    assert prepared(*sources, mix={"mine": 0.8, "general": 0.2}).parts == made.parts
    assert made.told["mix"] == {
        "mine": {"rows": 100, "share": 0.8, "different": 100},
        "general": {"rows": 25, "share": 0.2, "different": min(general, 25)},
    }
    if general == 500:
        assert prepared(*sources, mix={"mine": 0.8, "general": 0.2}, seed=8).parts != made.parts


def test_what_was_mixed_stands_in_the_report(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    recipe["data"] |= {"sources": tagged(tmp_path, mine=24, replay=30), "mix": {"mine": 0.75, "replay": 0.25}}
    recipe["data"]["split"] = {"validation": 0, "test": 8, "stratify": "tag"}
    recipe["train"]["max_steps"] = 1
    said = tunesmith("run", write_recipe(tmp_path, recipe))
    assert said.code == 0, said.err
    told = json.loads((tmp_path / "runs/tiny/data/manifest.json").read_text())["mix"]
    rows = read_jsonl(tmp_path / "runs/tiny/data/train.jsonl")
    replayed = [row for row in rows if row["metadata"]["tag"] == "replay"]
    assert told["replay"]["rows"] == len(replayed) == round(told["mine"]["rows"] / 3)
    page = (tmp_path / "runs/tiny/report.html").read_text()
    share = 100 * len(replayed) / len(rows)
    assert f"{len(replayed)} rows, {share:.1f}% of an epoch; {len(replayed)} different ones" in page


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), cuts=st.data())
def test_any_mix(prepared: Any, tmp_path: Path, sizes: list[int], cuts: Any) -> None:
    parts = [cuts.draw(st.integers(1, 9)) for _ in sizes]
    shares = {f"t{i}": part / sum(parts) for i, part in enumerate(parts)}
    made = prepared(*tagged(tmp_path, **{f"t{i}": n for i, n in enumerate(sizes)}), mix=shares)
    of = Counter(row.metadata["tag"] for row in made.parts["train"])
    main = max(shares, key=lambda t: shares[t])
    assert of[main] == sizes[int(main[1:])]
    for tag, share in shares.items():
        assert abs(of[tag] - of[main] * share / shares[main]) <= 0.5 + 1e-9


def test_a_sources_weight(prepared: Any, tmp_path: Path) -> None:
    a, b, c = tagged(tmp_path, a=10, b=10, c=10)
    made = prepared(a | {"weight": 2.5}, b | {"weight": 0.25}, c)
    assert Counter(row.metadata["tag"] for row in made.parts["train"]) == {"a": 25, "b": 2, "c": 10}
    assert made.counts["made"] == {"weight": 15} and made.counts["removed"] == {"weight": 8}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"mix": {"mine": 0.8, "generl": 0.2}}, "did you mean 'general'"),
        ({"mix": {"mine": 0.8, "general": 0.3}}, "must sum to 1"),
        ({"mix": {"mine": 1.0}}, "every source needs a tag"),
        ({"balance": {"how": "count"}}, "go together"),
        ({"balance": {"by": "kind", "weight": 2}}, "weight"),
        ({"split": {"time": "at", "stratify": "label"}}, "can't be stratified"),
    ],
)
def test_shapes_that_cannot_be_meant(tunesmith: Any, recipe: Any, tmp_path: Path, keys: Any, told: str) -> None:
    recipe["data"] |= {"sources": tagged(tmp_path, mine=3, general=3), **keys}
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 2 and told in said.json["error"]["what"]
