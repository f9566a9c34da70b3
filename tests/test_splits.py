"""Splits: by seed, stratified, and never the same on two sides."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import colour_rows, write_jsonl
from tests.prepared import PARTS
from tunesmith.conversation.message import Conversation, Message
from tunesmith.data.split import drawn, same_question
from tunesmith.errors import DataError


def test_splits_are_seeded_disjoint_and_stratified(prepared: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"Item {i} of kind {i % 5}", "completion": f"k{i % 5}"} for i in range(200)]
    rows += [{"prompt": f"ITEM {i}  of kind {i % 5}", "completion": f"k{i % 5}"} for i in range(0, 200, 4)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    split = {"validation": 0.1, "test": 0.2}
    made = prepared(path, split=split)
    assert made.told["answers"]["kind"] == "label" and set(made.told["answers"]["labels"]) == {
        f"k{i}" for i in range(5)
    }
    assert made.counts["test"] == 50 and made.counts["validation"] == 25 and made.counts["train"] == 175
    questions = {part: {same_question(row) for row in made.parts[part]} for part in PARTS}
    assert not questions["train"] & questions["test"] | questions["train"] & questions["validation"]
    assert not questions["test"] & questions["validation"]
    for part in ("validation", "test"):
        of = Counter(row.answer for row in made.parts[part])
        assert len(of) == 5 and max(of.values()) - min(of.values()) <= 4, of  # questions go in twos, here and there
    assert prepared(path, split=split).parts == made.parts
    assert prepared(path, split=split, seed=8).parts["test"] != made.parts["test"]
    ids = [row.id for row in made.parts["train"]]
    assert ids == sorted(ids, key=lambda i: int(i.rpartition(":")[2]))  # in the file's order
    counted = prepared(path, split={"validation": 7, "test": 11}).counts
    assert (counted["validation"], counted["test"], counted["train"]) == (7, 11, 232)
    assert prepared(path, split={"validation": 0.001, "test": 0}).counts["validation"] == 1
    once = prepared(str(write_jsonl(tmp_path / "b.jsonl", rows[:200])), split=split)
    for part, share in (("validation", 4), ("test", 8)):
        assert set(Counter(row.answer for row in once.parts[part]).values()) == {share}


def test_test_rows_of_their_own_push_their_questions_out_of_training(prepared: Any, tmp_path: Path) -> None:
    rows = colour_rows(40)
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    write_jsonl(tmp_path / "v.jsonl", [rows[1], rows[2], {"prompt": "new one", "completion": "red"}])
    write_jsonl(tmp_path / "t.jsonl", [rows[2], rows[3] | {"prompt": rows[3]["prompt"].upper()}])
    made = prepared(path, split={"validation": "v.jsonl", "test": "t.jsonl"})
    assert (made.counts["train"], made.counts["validation"], made.counts["test"]) == (37, 2, 2)
    assert made.counts["removed"] == {"in_test": 3, "in_validation": 1}
    assert sorted(r["row"] for r in made.removed) == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "v.jsonl:2"]
    assert all(r["messages"] for r in made.removed)
    with pytest.raises(DataError, match=r"data\.split\.test: no such file"):
        prepared(path, split={"test": "absent.jsonl"})


def test_pieces_of_a_row_stay_on_one_side() -> None:
    """Also where one of them asks what another row asks: all of these go together."""
    rows = [
        Conversation((Message("user", f"{name} {n}"), Message("assistant", "a")), f"f.jsonl:{i}#{n}")
        for i, name in enumerate("abcdefgh")
        for n in (1, 2, 3)
    ]
    rows.append(Conversation((Message("user", "A 2"), Message("assistant", "a")), "f.jsonl:90"))
    for seed in range(20):
        taken = drawn(rows, 9, seed)
        sides = [
            {row.question[0].lower() for row, out in zip(rows, taken, strict=True) if out == held} for held in (0, 1)
        ]
        assert sides[1] and not sides[0] & sides[1]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    questions=st.lists(st.integers(0, 12), min_size=3, max_size=40),
    validation=st.floats(0, 0.4) | st.integers(0, 10),
    test=st.floats(0, 0.4) | st.integers(0, 10),
    seed=st.integers(0, 99),
)
def test_no_split_leaks(prepared: Any, tmp_path: Path, questions: Any, validation: Any, test: Any, seed: int) -> None:
    rows = [{"prompt": f"Q {q}" if i % 2 else f"q  {q}", "completion": "ab"[q % 2]} for i, q in enumerate(questions)]
    path = write_jsonl(tmp_path / "s.jsonl", rows)
    split = {"validation": validation, "test": test}
    try:
        made = prepared(path.name, split=split, seed=seed)
    except DataError as error:
        assert "no row is left to train on" in error.what
        return
    seen = [{same_question(row) for row in made.parts[part]} for part in PARTS]
    assert sum(map(len, seen)) == len(set.union(*seen)) == len(set(questions))
    for part, share in split.items():
        wanted = share if isinstance(share, int) else max(round(share * len(rows)), 1 if share else 0)
        assert made.counts[part] <= wanted
