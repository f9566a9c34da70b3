"""Cleaning steps, through the data stage: what each changes, removes, lists, and how it is accounted for."""

from __future__ import annotations

import csv
import json
import random
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import write_jsonl
from tunesmith.conversation.message import Text
from tunesmith.data.clean import minhash, near
from tunesmith.data.clean.boilerplate import Boilerplate
from tunesmith.data.clean.markdown import Markdown
from tunesmith.data.engines.local import LocalRunning
from tunesmith.data.groups import Groups
from tunesmith.errors import DataError, RecipeError
from tunesmith.recipe import build


def pairs(*rows: tuple[str, str]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows]


@pytest.fixture
def cleaned(prepared: Any, tmp_path: Path) -> Any:
    """The data stage over some rows with some cleaning steps; gives (prepared, accounts by step)."""

    def run(rows: list[dict[str, Any]], clean: dict[str, Any], **keys: Any) -> tuple[Any, dict[str, Any]]:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        made = prepared(path.name, clean=clean, **keys)
        accounts = json.loads((tmp_path / "out/steps.json").read_text())
        assert [a["step"] for a in accounts] == [name for name, on in clean.items() if on is not False]
        for account in accounts:
            assert account["removed"] == made.counts["removed"].get(account["step"], 0)
            touched = account["changed"] + account["removed"] + account["flagged"]
            assert len(account["examples"]) == min(10, touched)
        return made, {a["step"]: a for a in accounts}

    return run


def answers(made: Any) -> list[str]:
    return [row.answer for row in made.parts["train"]]


def test_text_that_was_broken_on_its_way_is_mended(cleaned: Any) -> None:
    rows = pairs(
        ("Is the cafÃ© open?", "Yes â€“ till 9."),
        ("Fish &amp; chips<br>or <b>soup</b>?", "Soup\x00\x07 it is.  \r\n\r\n\r\n\r\nBye"),
        ("What does `<b>&amp;</b>` mean?", "```html\n<b>bold</b>\n```"),
        ("Is 3 < 4 & 5 > 4?", "Yes,\u00a0both."),
        ("fine", "fine"),
    )
    made, told = cleaned(rows, {"unicode": True})
    assert made.turns() == [
        [("user", "Is the café open?"), ("assistant", "Yes – till 9.")],
        [("user", "Fish & chips\nor soup?"), ("assistant", "Soup it is.\n\nBye")],
        [("user", "What does `<b>&amp;</b>` mean?"), ("assistant", "```html\n<b>bold</b>\n```")],
        [("user", "Is 3 < 4 & 5 > 4?"), ("assistant", "Yes, both.")],
        [("user", "fine"), ("assistant", "fine")],
    ]
    assert told["unicode"]["changed"] == 3 and made.counts["removed"] == {}
    assert told["unicode"]["examples"][0] | {"why": ""} == {
        "row": "rows.jsonl:1", "did": "changed", "why": "",
        "before": "Is the cafÃ© open?", "after": "Is the café open?",
    }  # fmt: skip
    partly, _ = cleaned(rows, {"unicode": {"html": False}})
    assert "<br>" in partly.turns()[1][0][1] and "café" in partly.turns()[0][0][1]
    off, told = cleaned(rows, {"unicode": False})
    assert "Ã" in off.turns()[0][0][1] and told == {}


def test_a_row_that_cleaning_leaves_without_an_answer_goes(cleaned: Any) -> None:
    made, _ = cleaned(pairs(("Hello?", "\u200b<!-- nothing -->"), ("Hello?", "Hi")), {"unicode": True})
    assert answers(made) == ["Hi"]
    assert made.removed[0]["why"] == "mended; then the answer is empty"


@pytest.mark.parametrize("seed", [0, 1])
def test_steps_run_in_the_recipes_order(cleaned: Any, seed: int) -> None:
    rows = pairs(("Is the café open?", "Yes"), ("Is the cafÃ© open?", "Yes"))
    steps = [("unicode", True), ("duplicates", "exact")]
    made, _ = cleaned(rows, dict(steps if seed else reversed(steps)))
    assert made.counts["train"] == (1 if seed else 2)


def test_rows_in_other_languages_go_and_uncertain_ones_stay(cleaned: Any) -> None:
    rows = pairs(
        ("Where is the invoice that I asked for?", "It was sent to you on Monday."),
        ("Wo ist die Rechnung, die ich bestellt habe?", "Sie wurde am Montag verschickt."),
        ("Where is the invoice that I asked for?", "Sie wurde am Montag an Ihre Adresse verschickt."),
        ("ok?", "ja"),
    )
    made, told = cleaned(rows, {"language": ["en"]})
    assert [r["row"] for r in made.removed] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert told["language"]["found"] == {"en": 2, "de": 2, "not judged": 1}
    assert cleaned(rows, {"language": ["en", "de"]})[0].counts["train"] == 4
    assert cleaned(rows, {"language": {"keep": "en", "on": "prompt"}})[0].counts["train"] == 3


def test_banking77_is_english(cleaned: Any, shared: Path) -> None:
    with (shared / "banking77/test.csv").open() as file:
        rows = pairs(*((r["text"], r["category"]) for r in csv.DictReader(file)))
    made, told = cleaned(rows, {"language": {"keep": ["en"], "on": "prompt"}})
    assert made.counts["removed"] == {} and told["language"]["found"]["en"] > 2000


def test_odd_lengths_and_repetition(cleaned: Any) -> None:
    rows = pairs(*((f"Question {i} is what?", "An answer of some words " + "x" * (i % 9)) for i in range(40)))
    made, told = cleaned([*rows, *pairs(("Long?", "word " * 4000), ("Short?", "y"))], {"length": True})
    assert [r["row"] for r in made.removed] == ["rows.jsonl:41", "rows.jsonl:42"]
    assert told["length"]["found"] == {"answer outlier": 2}
    bounded, told = cleaned(rows, {"length": {"shortest": 26, "longest": 30, "outliers": None, "action": "report"}})
    assert bounded.counts["train"] == 40 and told["length"]["flagged"] == bounded.counts["flagged"] > 10
    prose = (
        "The quick brown fox jumps over a lazy dog while nine other animals of the old farm look on in quiet wonder."
    )
    rows = pairs(
        ("Over and over?", "I am sorry to hear that you wait. " * 9),
        ("Same line?", "\n".join(["It is so."] * 9)),
        ("Fine?", prose),
        ("Short?", "no no no no"),
    )
    made, told = cleaned(rows, {"repetition": True})
    assert answers(made) == [prose, "no no no no"]
    assert all("repeats itself" in r["why"] for r in made.removed)


def test_boilerplate_goes_and_a_models_talk_of_itself(cleaned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    common = Boilerplate._common
    monkeypatch.setattr(Boilerplate, "_common", lambda self, rows: counted.append(len(rows)) or common(self, rows))
    bye = "Thank you for contacting our support."
    rows = pairs(*((f"Q{i}?", f"Answer number {i}.\n{bye}") for i in range(8)), ("Only that?", bye))
    rows += pairs(("Who are you?", "As an AI language model, I cannot say."))
    made, told = cleaned(rows, {"boilerplate": True})
    assert answers(made) == [*(f"Answer number {i}." for i in range(8)), bye]
    assert told["boilerplate"]["tables"]["shared lines"] == [{"line": bye, "rows": 8}] and counted == [10]
    assert made.removed[0]["why"] == "the answer says 'As an AI language model'"


def test_turns_are_put_in_order_and_echoes_go(cleaned: Any) -> None:
    def chat(*turns: tuple[str, str]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": text} for role, text in turns]}

    rows = [
        chat(("user", "One."), ("user", "Two."), ("assistant", "Three.")),
        chat(("user", "Hi"), ("assistant", "Hello"), ("user", " "), ("assistant", "More?")),
        chat(("user", "Where is my card?"), ("assistant", "where is my card")),
    ]
    made, told = cleaned(rows, {"turns": True})
    assert made.turns() == [
        [("user", "One.\n\nTwo."), ("assistant", "Three.")],
        [("user", "Hi"), ("assistant", "Hello\n\nMore?")],
    ]
    assert told["turns"]["changed"] == 2 and made.counts["removed"] == {"turns": 1}


LONG = "Please tell me how I can change the address that my new card is sent to before it leaves your house today"


def test_exact_and_near_duplicates(cleaned: Any) -> None:
    rows = pairs(
        ("Where is my card?", "On its way."),
        ("where is my CARD", "On its way!"),
        ("Where is my card?", "No idea."),
        (LONG, "In the app."),
        (LONG + " please", "In the app."),
    )
    made, told = cleaned(rows, {"duplicates": "exact"})
    assert [r["row"] for r in made.removed] == ["rows.jsonl:2"]
    assert made.removed[0]["why"] == "says the same as rows.jsonl:1"
    made, told = cleaned(rows, {"duplicates": "near"})
    assert [r["row"] for r in made.removed] == ["rows.jsonl:2", "rows.jsonl:5"]
    assert told["duplicates"]["tables"]["groups"][0]["removed"] == 1
    made, _ = cleaned(rows, {"duplicates": {"kind": "near", "on": "prompt", "keep": "longest"}})
    assert [r["row"] for r in made.removed] == ["rows.jsonl:2", "rows.jsonl:3", "rows.jsonl:4"]
    assert cleaned(rows, {"duplicates": {"kind": "near", "threshold": 0.97}})[0].counts["train"] == 4


def test_every_true_near_duplicate_is_found_and_no_false_one(cleaned: Any, shared: Path) -> None:
    for size in (100, 1000):
        lines = (shared / f"dedup/articles_{size}.train").read_text().splitlines()
        rows = [dict(zip(("prompt", "completion"), line.split(" ", 1), strict=True)) for line in lines]
        truth = {frozenset(p.split()) for p in (shared / f"dedup/articles_{size}.truth").read_text().splitlines()}
        made, _ = cleaned(rows, {"duplicates": {"kind": "near", "on": "answer"}}, max_length=10**6)
        name = {f"rows.jsonl:{i}": row["prompt"] for i, row in enumerate(rows, 1)}
        found = {frozenset((name[r["row"]], name[r["why"].split()[-1]])) for r in made.removed}
        assert found == truth


words = st.lists(st.sampled_from(["a", "b", "c", "d", "e", "f"]), max_size=12).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(words, min_size=1, max_size=25),
    threshold=st.sampled_from([0.5, 0.8, 1.0]),
    crowd=st.sampled_from([0, 3, near.CROWD]),
)
def test_bands_find_what_comparing_all_pairs_finds(texts: list[str], threshold: float, crowd: int) -> None:
    """Whether rows that share a band are compared as they are, or told apart by their rarest runs first."""

    def runs(text: str) -> frozenset[tuple[str, ...]]:
        parts = text.split()
        return frozenset(zip(*(parts[i:] for i in range(3)), strict=False)) or frozenset(
            {tuple(parts)} if parts else ()
        )

    sets = [runs(text) for text in texts]
    groups = Groups(len(texts))
    for i, j in combinations(range(len(texts)), 2):
        if sets[i] and len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j]):
            groups.join(i, j)
    rows = [Text((), text=text) for text in texts]
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(near, "CROWD", crowd)
        keys = near.keys_of(rows, near.Sketch("both", 3, threshold, Path(name)), LocalRunning())
        leaders, partly = near.nearly_same(keys, threshold, Path(name), LocalRunning())
        assert (leaders == groups.leaders()).all() and not partly.any()


def compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs of rows are compared from now on, a number a time."""
    counts: list[int] = []
    alike = near.Runs.alike

    def counting(self: near.Runs, one: np.ndarray, other: np.ndarray, threshold: float) -> np.ndarray:
        counts.append(len(one))
        return alike(self, one, other, threshold)

    monkeypatch.setattr(near.Runs, "alike", counting)
    return counts


def test_rows_of_one_template_are_not_all_compared(cleaned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of what each row says is a template's: hundreds share a band, and one in ten is truly like another."""
    draw = random.Random(4)
    opening = " ".join(f"word{i}" for i in range(30))
    own = [[f"own{draw.randrange(10**6)}" for _ in range(10)] for _ in range(900)]
    for i in range(0, 900, 10):
        own[i + 1] = [*own[i][:-1], "other"]
    counts = compared(monkeypatch)
    rows = pairs(*((f"{opening} {' '.join(words)}", "yes") for words in own))
    made, told = cleaned(rows, {"duplicates": "near"})
    assert [row["row"] for row in made.removed] == [f"rows.jsonl:{i + 2}" for i in range(0, 900, 10)]
    assert told["duplicates"]["found"] == {"near": 90}
    assert 90 <= sum(counts) < 20 * 900  # of 404,550 pairs


def test_rows_that_are_compared_with_some_only_are_told(cleaned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of every pair of two lists of words share their rarest runs with a whole list of others."""
    opening, end = (" ".join(f"{word}{i}" for i in range(18)) for word in ("one", "two"))
    rows = pairs(*((f"{opening} noun{i % 6} {end[:50]} mood{i // 6} {end[50:]}", "yes") for i in range(36)))
    step = {"kind": "near", "threshold": 0.9}
    made, told = cleaned(rows, {"duplicates": step})
    assert made.counts["train"] == 36 and told["duplicates"]["found"] == {}
    monkeypatch.setattr(near, "CROWD", 4)
    made, told = cleaned(rows, {"duplicates": step})
    assert made.counts["train"] == 36 and told["duplicates"]["found"] == {}
    monkeypatch.setattr(near, "HEADS", 2)
    counts = compared(monkeypatch)
    made, told = cleaned(rows, {"duplicates": step})
    assert made.counts["train"] == 36 and 18 < told["duplicates"]["found"]["compared with some only"] <= 36
    assert 0 < sum(counts) < 36 * 35 / 2


@pytest.mark.parametrize("alike", [0.3, 0.5, 0.7])
def test_as_many_pairs_share_a_band_as_theory_says(alike: float) -> None:
    """Of sets with a similarity s, 1 - (1 - s^r)^b share one of b bands of r (Leskovec et al., Mining of Massive
    Datasets, 3.4)."""
    draw, size, pairs = np.random.default_rng(5), 60, 2000
    shared = round(2 * size * alike / (1 + alike))
    runs = draw.integers(0, 2**64, (pairs, 2, size), dtype=np.uint64)
    runs[:, 1, :shared] = runs[:, 0, :shared]
    s = shared / (2 * size - shared)
    keys = minhash.band_keys(runs.reshape(-1), np.arange(1, 2 * pairs + 1) * size, 0.8).reshape(pairs, 2, -1)
    bands, rows = minhash.band_shape(0.8)
    expected = 1 - (1 - s**rows) ** bands
    share = (keys[:, 0] == keys[:, 1]).any(axis=1).mean()
    assert abs(share - expected) < 4 * (expected * (1 - expected) / pairs) ** 0.5
    assert abs((keys[:, 0] == keys[:, 1]).mean() - s**rows) < 5 * (s**rows / pairs / bands) ** 0.5


def test_words_are_told_apart_whatever_their_length() -> None:
    """Hashes of words are equal where the words are: of every length, script and place in the text."""
    draw = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789äßж字ก"
    spoken = [
        "".join(draw.choices(letters, k=draw.choice([1, 2, 7, 8, 9, 16, 17, 63, 64, 65, 200]))) for _ in range(500)
    ]
    texts = [" ".join(draw.choices(spoken, k=draw.randint(0, 30))) for _ in range(400)] + ["", "?!", "_"]
    flat, ends = minhash.hashes_of(texts)
    assert np.diff(ends, prepend=0).tolist() == [len(minhash.words_of(text)) for text in texts]
    words = [word for text in texts for word in minhash.words_of(text)]
    assert len(set(zip(words, flat.tolist(), strict=True))) == len(set(words)) == len(set(flat.tolist()))


@pytest.mark.parametrize(
    ("text", "mended"),
    [
        ("See:\n```python\nx = 1", "See:\n```python\nx = 1\n```"),
        ("~~~~\na\n~~~\n", "~~~~\na\n~~~\n~~~~"),
        ("```\na\n```\nb", None),
        ("`a` ``b`` and ```c```", None),
        ("| a | b |\n| 1 | 2 |", "| a | b |\n| --- | --- |\n| 1 | 2 |"),
        ("| a | b | c |\n|:-:|---|\n| 1 | 2 | 3 |", "| a | b | c |\n| :-: | --- | --- |\n| 1 | 2 | 3 |"),
        ("| a |\n|---|---|\n| 1 |", "| a |\n| --- |\n| 1 |"),
        ("| a \\| b | c |\n|---|---|\n| 1 | 2 |", None),
        ("```\n| a | b |\n| 1 | 2 |\n```", None),
        ("x | y and |z|\n| one line |", None),
        ("You need:\n• a passport\n  ◦ a copy\n•\tthe form", "You need:\n- a passport\n  - a copy\n- the form"),
        ("- one\n* two\n* three\n\n* other", "- one\n- two\n- three\n\n* other"),
        ("-Open it\n-Close it", "- Open it\n- Close it"),
        ("1.open it\n2. wait\n3)close it", "1. open it\n2. wait\n3)close it"),
        ("9)a\n10)b", "9) a\n10) b"),
        ("1. one\n2. two\n3.", "1. one\n2. two"),
        ("* one\n*\n", "* one"),
        ("-v is long, -q is not\n-q\n-rf all", None),
        ("*Note* this\n*Note* that\n-5 degrees\n-7 degrees\n1.5 is\n2.5 is not\n-Ann", None),
        ("- old\n+ new\n\nTitle\n-\n\n* * *", None),
        ("```\n• a\n-A\n-B\n- a\n* b\n```", None),
        ("- one\n- - -\n* * *", None),
    ],
)
def test_broken_markdown(cleaned: Any, text: str, mended: str | None) -> None:
    made, told = cleaned(pairs(("a", text)), {"markdown": True})
    assert answers(made) == [mended or text] and told["markdown"]["changed"] == (mended is not None)
    made, told = cleaned(pairs(("a", text)), {"markdown": {"fences": False, "tables": False, "lists": False}})
    assert answers(made) == [text]


MARKED = ["```", "````", "~~~", "```py", "| a | b |", "|-|", "|--|:-:|", "", "x", "| 1 |", "• a", "-A", "- b", "* c",
          "1.d", "2.e", "2. f", "*", "2.", "  * g", "---"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(st.sampled_from(MARKED)))
def test_mended_markdown_is_whole(lines: list[str]) -> None:
    """By another reader of it: what was mended needs no second time, and no code block is open at the end."""
    from markdown_it import MarkdownIt

    text = "\n".join(lines)
    mended = Markdown().mend(text)
    assert Markdown().mend(mended) == mended
    tokens = MarkdownIt("commonmark").enable("table").parse(f"{mended}\n\nThe end.")
    assert [token.content for token in tokens if token.type == "inline"][-1:] == ["The end."]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_normalising_is_stable(text: str) -> None:
    once = minhash.normalised(text)
    assert minhash.normalised(once) == once


THIRTEEN = "the quick brown fox jumps over one lazy dog and then it runs away from here"


def test_training_rows_that_a_test_asks_again_are_removed(cleaned: Any, tmp_path: Path) -> None:
    rows = pairs(
        ("Where is my card?", "a"),
        (f"Tell me: {THIRTEEN}!", "b"),
        ("Please tell me how I can change an address that my new card is sent to before it leaves the house", "c"),
        ("What would " + THIRTEEN[:40], "d"),
        ("Say it.", f"Well, {THIRTEEN}."),
    )
    write_jsonl(tmp_path / "t.jsonl", pairs(("WHERE is my card", "a"), (THIRTEEN, "b"), (LONG[:-6], "c")))
    made, told = cleaned(rows, {"contamination": {"threshold": 0.5}}, split={"validation": 0, "test": "t.jsonl"})
    assert answers(made) == ["d"] and made.counts["test"] == 3
    assert told["contamination"]["found"] == {"test": 4}
    assert [r["why"] for r in made.removed] == [
        "asks the same as test row t.jsonl:1",
        "shares 13 words in a row with test row t.jsonl:2",
        "is nearly the same as test row t.jsonl:3",
        "shares 13 words in a row with test row t.jsonl:2",
    ]
    (tmp_path / "bench.jsonl").write_text(json.dumps({"q": {"text": THIRTEEN}, "choices": ["yes", "no"]}) + "\n")
    made, told = cleaned(rows, {"contamination": ["test", "bench.jsonl"]})
    assert told["contamination"]["found"] == {"bench.jsonl": 2} and answers(made) == ["a", "c", "d"]
    with (tmp_path / "bench.jsonl").open("a") as file:
        file.write('{"q": "Where is')
    with pytest.raises(DataError, match="is not JSON") as refused:
        cleaned(rows, {"contamination": ["test", "bench.jsonl"]})
    assert str(refused.value.where).endswith("bench.jsonl:2")


RULES = " ".join(f"Rule {i} says {i * 7}." for i in range(30))


@pytest.mark.parametrize("template", [f"{RULES} Now classify: {{}}", f"{{}} Now say, by these rules: {RULES}",
                                      "Say in one word which team is to have this ticket: {}"])  # fmt: skip
def test_words_of_a_template_prove_nothing(cleaned: Any, tmp_path: Path, template: str) -> None:
    """What all rows share, before or after their own words, contaminates none; what a few share with a test does."""
    asked = [" ".join(f"{word}{i * 31 % 57}" for word in LONG.split()) for i in range(57)]
    tests = [template.format(text) for text in [*asked[50:], "I want my card", THIRTEEN]]
    rows = pairs(
        *((template.format(text), f"team {i}") for i, text in enumerate(asked[:50])),
        (template.format("I want my cat"), "team 50"),
        (template.format("I want my CARD!"), "the same"),
        (template.format(f"{asked[51]} please"), "nearly"),
        (template.format(f"They said: {THIRTEEN}"), "thirteen"),
    )
    write_jsonl(tmp_path / "t.jsonl", pairs(*((text, "team") for text in tests)))
    split = {"validation": 0, "test": "t.jsonl", "near": None}
    made, _ = cleaned(rows, {"contamination": ["test"]}, split=split, max_length=4000)
    why = {row["messages"][-1]["content"]: row["why"].split(" test row")[0] for row in made.removed}
    assert {row["step"] for row in made.removed} <= {"contamination", "in_test"}
    assert why.keys() == {"the same", "nearly", "thirteen"}, why
    assert why["thirteen"] == "shares 13 words in a row with"


def test_near_duplicates_of_a_drawn_test_row_leave_training(cleaned: Any) -> None:
    def asked(i: int) -> str:
        return " ".join(f"{word}{i // 2}" for word in LONG.split()) + " and so on" * (i % 2)

    rows = pairs(*((asked(i), f"answer {i}") for i in range(60)))
    made, _ = cleaned(rows, {"contamination": {"against": ["test", "validation"], "words": 40, "threshold": 0.75}})
    assert made.counts["removed"] == {}  # nothing is held out
    split = {"validation": 0, "test": 6, "near": None}
    made, told = cleaned(rows, {"contamination": {"words": 40, "threshold": 0.75}}, split=split)
    assert made.counts["test"] == 6 and 0 < told["contamination"]["removed"] <= 6


def test_the_texts_that_banking77_shares_are_found(cleaned: Any, shared: Path, tmp_path: Path) -> None:
    parts = {}
    for part in ("train", "test"):
        with (shared / f"banking77/{part}.csv").open() as file:
            parts[part] = pairs(*((r["text"], r["category"]) for r in csv.DictReader(file)))
    write_jsonl(tmp_path / "t.jsonl", parts["test"])
    tests = {row["prompt"].strip() for row in parts["test"]}
    rows = [row for i, row in enumerate(parts["train"]) if i % 5 == 0 or row["prompt"].strip() in tests]
    made, _ = cleaned(rows, {"contamination": ["test"]}, split={"validation": 0, "test": "t.jsonl"})
    same = {r["row"] for r in made.removed if "asks the same" in r["why"]}
    known = {f"rows.jsonl:{i}" for i, row in enumerate(rows, 1) if row["prompt"].strip() in tests}
    assert len(known) == 6 and known <= same


@pytest.mark.parametrize(
    ("clean", "told"),
    [
        ({"unicod": True}, "data.clean.unicod: no clean is called 'unicod'; did you mean 'unicode'?"),
        ({"duplicates": {"treshold": 1}}, "data.clean.duplicates.treshold: unknown key; did you mean 'threshold'?"),
        ({"duplicates": "nearly"}, "data.clean.duplicates.kind: expected 'exact', 'near' or 'semantic'"),
        ({"unicode": "yes"}, "data.clean.unicode: expected true, false or a mapping of encoding"),
        ({"language": ["english"]}, "'english' is not a language's code"),
    ],
)
def test_a_step_that_cannot_be_meant_is_an_error(clean: dict[str, Any], told: str) -> None:
    with pytest.raises(RecipeError) as error:
        build({"name": "x", "model": "m", "data": {"sources": ["a.jsonl"], "clean": clean}})
    assert told in str(error.value)


def test_a_recipe_with_steps_reads_back_as_it_was() -> None:
    clean = {"duplicates": "near", "unicode": True, "language": ["en"], "turns": False}
    recipe = build({"name": "x", "model": "m", "data": {"sources": ["a.jsonl"], "clean": clean}})
    again = build(recipe.model_dump(mode="json"))
    assert again == recipe and list(again.data.clean) == ["duplicates", "unicode", "language"]
