"""Steps that look at each row alone, done by any process; and the tally of what any step does."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import RowStep, Verdict
from tunesmith.data.ledger import Ledger, Saved
from tunesmith.data.shelf import Places, Rows, Shelf
from tunesmith.data.unusable import Unusable

Usable = Callable[[Conversation], None]
AT_ONCE = 512  # rows


@dataclass(frozen=True)
class Done:
    """What a step did to some rows.

    Attributes:
        touched: numbers of the rows that it changed, removed or listed, among those that its process was given.
    """

    rows: int
    changed: int
    removed: int
    flagged: int
    found: Counter[str]
    touched: np.ndarray
    ledger: Saved


class Tally:
    """Counts what a step does, row by row."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self._ledger = name, Ledger(folder)
        self._rows = self._changed = self._removed = self._flagged = 0
        self._found: Counter[str] = Counter()
        self._touched = array("q")

    def add(self, number: int, row: Conversation, verdict: Verdict) -> Conversation | None:
        """The row as it goes on; None where it is removed."""
        self._rows += 1
        if verdict.found:
            self._found.update(verdict.found)
        if verdict.row is row and not verdict.why:
            return row
        self._touched.append(number)
        if verdict.row is None:
            self._removed += 1
            self._ledger.remove(row, row.id, self.name, verdict.why)
        elif verdict.row is row:
            self._flagged += 1
            self._ledger.flag(row, self.name, verdict.why)
        else:
            self._changed += 1
        return verdict.row

    def keep(self, rows: int) -> None:
        """Count rows that stay as they are."""
        self._rows += rows

    def done(self, stem: Path) -> Done:
        """What it came to; the ledger lies in files that begin with `stem`."""
        counts = (self._rows, self._changed, self._removed, self._flagged)
        return Done(*counts, self._found, np.array(self._touched, dtype=np.int64), self._ledger.save(stem))


@dataclass(frozen=True)
class Look:
    """Applies steps one after the other. The item is (a shard's number, rows); the result the places of the rows that
    are left, and what each step did."""

    steps: Mapping[str, RowStep]
    usable: Usable
    shelf: Shelf

    def __call__(self, item: tuple[int, Rows]) -> tuple[Places, list[Done]]:
        shard, rows = item
        tallies = [Tally(name, self.shelf.folder) for name in self.steps]
        places: list[int] = []
        with self.shelf.writer(shard) as writer:
            for start in range(0, len(rows), AT_ONCE):
                given = dict(enumerate(rows[start : start + AT_ONCE], start))
                left = given.copy()
                for step, tally in zip(self.steps.values(), tallies, strict=True):
                    looked = zip(left.items(), step.looks(list(left.values())), strict=True)
                    told = [(i, tally.add(i, row, checked(verdict, self.usable))) for (i, row), verdict in looked]
                    left = {i: row for i, row in told if row is not None}
                places += [int(rows.places[i]) if row is given[i] else writer.add(row) for i, row in left.items()]
        stem = self.shelf.folder / f"look-{shard}"
        did = [tally.done(stem.with_name(f"{stem.name}-{tally.name}")) for tally in tallies]
        return np.array(places, dtype=np.int64), did


def checked(verdict: Verdict, usable: Usable) -> Verdict:
    """The verdict; or to remove the row, if nothing can be learnt from what a step made of it."""
    if verdict.row is not None and verdict.why:
        try:
            usable(verdict.row)
        except Unusable as error:
            return Verdict(None, f"{verdict.why}; then {error.why}", verdict.found)
    return verdict
