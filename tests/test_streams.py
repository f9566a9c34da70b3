"""Reports and comparisons of prepared sets keep no rows in memory, however many there are."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import write_jsonl, write_recipe
from tunesmith.data import shelf
from tunesmith.data.diff import matched
from tunesmith.data.groups import DIGEST


class Alive:
    """How many rows that were read from disk are there at once."""

    def __init__(self) -> None:
        self.read = self.now = self.most = 0

    def watch(self, row: Any) -> Any:
        self.read += 1
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(row, self._gone)
        return row

    def _gone(self) -> None:
        self.now -= 1


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Alive:
    counted, decoded = Alive(), shelf.decoded
    monkeypatch.setattr(shelf, "decoded", lambda line: counted.watch(decoded(line)))
    monkeypatch.setattr(shelf, "CHUNK", 50)
    return counted


def test_reports_and_differences_hold_few_rows(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, alive: Alive
) -> None:
    rows = [{"prompt": f"What is {i} times {i}?", "completion": str(i * i)} for i in range(900)]
    recipe["data"] |= {"split": {"validation": 0.1, "test": 0.2}}
    path = write_recipe(tmp_path, recipe)
    for name, kept in (("one", rows), ("other", rows[300:])):
        write_jsonl(tmp_path / "rows.jsonl", kept)
        assert tunesmith("data", "prepare", path, "--set", f"name={name}").code == 0
    alive.read = alive.most = 0
    found = tunesmith("data", "report", "one", "--json").json
    assert found["counts"]["train"] == 630 and found["checks"]["exact duplicates"]["looked at"] == 630
    assert alive.read > 630 and alive.most <= 2 * shelf.CHUNK + 10, (alive.read, alive.most)
    alive.read = alive.most = 0
    found = tunesmith("data", "diff", "one", "other", "--json").json
    assert found["same"] == 600 and found["removed"]["rows"] == 300 and found["added"]["rows"] == 0
    assert found["other part"] > 0 and sum(found["removed"]["by part"].values()) == 300
    assert alive.read > 1500 and alive.most <= 2 * shelf.CHUNK + 10, (alive.read, alive.most)


@settings(max_examples=100, deadline=None)
@given(old=st.lists(st.integers(1, 5), max_size=12), new=st.lists(st.integers(1, 5), max_size=12))
def test_rows_are_matched_one_to_one(old: list[int], new: list[int]) -> None:
    one, other = matched(*(np.array([(n, n) for n in side], dtype=DIGEST) for side in (old, new)))
    assert [old[i] for i in one.tolist()] == [new[j] for j in other.tolist()]
    assert Counter(old[i] for i in one.tolist()) == Counter(old) & Counter(new)
    assert len(set(one.tolist())) == len(one) and len(set(other.tolist())) == len(other)
    assert one.tolist() == sorted(one.tolist())
