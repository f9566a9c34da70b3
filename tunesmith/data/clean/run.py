"""The recipe's cleaning steps, one after the other, each with an account of what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.look import Done, Look, Tally, Usable, checked
from tunesmith.data.clean.step import Around, RowStep, Step, Verdict
from tunesmith.data.clean.texts import texts
from tunesmith.data.ledger import Entries, Ledger
from tunesmith.data.shelf import CHUNK, Rows, Shelf, joined
from tunesmith.progress import bar

Advance = Callable[[int], None]

EXAMPLES = 10
SHOWN = 300
AROUND = 40


@dataclass
class Account:
    """What one step did.

    Attributes:
        rows: how many it looked at.
        changed, removed, flagged: how many of them it changed, took out, or listed for a person.
        found: what it found, counted by kind.
        examples: up to ten, drawn evenly from what it touched: {row, did, why, before, after}.
        note: what it says of itself.
        tables: what else it tells, by name; of several parts, each part's by its own.
    """

    step: str
    settings: dict[str, Any]
    rows: int = 0
    changed: int = 0
    removed: int = 0
    flagged: int = 0
    found: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    note: str = ""
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__) | {"found": dict(self.found.most_common())}


@dataclass(frozen=True)
class Part:
    """What became of a part's rows in one step.

    Attributes:
        rows: those that it was given.
        did: what each process that worked on it tells.
        example: the row that it touched as the how manieth, as the step was given it, and its verdict.
    """

    rows: Rows
    did: Sequence[Done]
    example: Callable[[int], tuple[Conversation, Verdict]]


class Cleaning:
    """The steps of a recipe, and their accounts in the recipe's order."""

    def __init__(self, steps: Mapping[str, Step], usable: Usable, ledger: Ledger, shelf: Shelf) -> None:
        """Args:
        usable: raises Unusable for a row that can't be learnt from; asked of every row that a step changed.
        """
        self.steps, self._usable, self._ledger, self._shelf = steps, usable, ledger, shelf
        self.accounts = {name: Account(name, step.model_dump(mode="json")) for name, step in steps.items()}

    def before_split(self, parts: dict[str, Rows], around: Around) -> dict[str, Rows]:
        """Each part's rows, cleaned on their own."""
        return self._through([name for name, step in self.steps.items() if not step.after_split], parts, around)

    def after_split(self, rows: Rows, around: Around) -> Rows:
        """The training rows, held against those that are held out."""
        names = [name for name, step in self.steps.items() if step.after_split]
        return self._through(names, {"train": rows}, around)["train"]

    def hide(self, text: str) -> str:
        """A text as it may be written beside the rows: without what the recipe wants nobody to read."""
        for step in self.steps.values():
            text = step.hide(text)
        return text

    def _through(self, names: Sequence[str], parts: dict[str, Rows], around: Around) -> dict[str, Rows]:
        for group in self._groups(names):
            told: list[list[Part]] = []
            left = {}
            do = self._looked if isinstance(self.steps[group[0]], RowStep) else self._judged
            with bar(f"Cleaning: {', '.join(group)}", sum(map(len, parts.values()))) as progress:
                for part, rows in parts.items():
                    left[part], steps = do(group, rows, around, progress.advance)
                    told.append(steps)
            several = sum(len(rows) > 0 for rows in parts.values()) > 1
            for name, did in zip(group, zip(*told, strict=True), strict=True):  # step by step, as in the recipe
                for part, one in zip(parts, did, strict=True):
                    self._tell(name, one, f", {part}" if several else "")
            parts = left
        return parts

    def _groups(self, names: Sequence[str]) -> list[list[str]]:
        """Steps that look at each row alone are done together, so that rows are read once for all of them."""
        groups: list[list[str]] = []
        for name in names:
            step = self.steps[name]
            alone = isinstance(step, RowStep) and type(step).tell is Step.tell
            if alone and groups and isinstance(self.steps[groups[-1][-1]], RowStep):
                groups[-1].append(name)
            else:
                groups.append([name])
        return groups

    def _looked(self, names: list[str], rows: Rows, around: Around, advance: Advance) -> tuple[Rows, list[Part]]:
        steps: dict[str, Any] = {name: self.steps[name] for name in names}
        pieces = rows.chunks()
        items = [(self._shelf.number(), piece) for piece in pieces]
        places: list[np.ndarray] = []
        did: list[list[Done]] = [[] for _ in names]
        start = 0
        work = Look(steps, self._usable, self._shelf)
        for piece, (left, done) in zip(pieces, around.engine.map(work, items, len(rows)), strict=True):
            places.append(left)
            for known, one in zip(did, done, strict=True):
                known.append(replace(one, touched=one.touched + start))
            start += len(piece)
            advance(len(piece))

        def example(place: int, which: int) -> tuple[Conversation, Verdict]:
            row = rows[_at([one.touched for one in did[place]], which)]
            for step in list(steps.values())[:place]:  # a look at a row is the same whenever it is taken
                row = checked(step.look(row), self._usable).row or row
            return row, checked(list(steps.values())[place].look(row), self._usable)

        told = [Part(rows, did[place], partial(example, place)) for place in range(len(names))]
        return joined((Rows(self._shelf, p) for p in places), self._shelf), told

    def _judged(self, names: list[str], rows: Rows, around: Around, advance: Advance) -> tuple[Rows, list[Part]]:
        name, whys = names[0], Entries(self._shelf.folder)
        tally = Tally(name, self._shelf.folder)
        places, shard, seen = rows.places.copy(), self._shelf.number(), 0
        with self._shelf.writer(shard) as writer:
            verdicts = iter(self.steps[name].apply(rows, around) if len(rows) else ())
            while some := list(islice(verdicts, CHUNK)):
                told = [number for number, given in enumerate(some, seen) if given is not None]
                tally.keep(len(some) - len(told))
                for number, row in zip(told, rows[np.array(told, dtype=np.int64)], strict=True):
                    given = some[number - seen]
                    assert given is not None
                    same = given.row is not None and given.row == row  # the step may have read the row anew
                    verdict = checked(replace(given, row=row) if same else given, self._usable)
                    left = tally.add(number, row, verdict)
                    if verdict.why or left is not row:
                        whys.append({"why": verdict.why})
                    if left is not row:
                        places[number] = -1 if left is None else writer.add(left)
                seen += len(some)
                advance(len(some))
        assert seen == len(rows), f"{name} gave {seen} verdicts on {len(rows)} rows"
        done = tally.done(self._shelf.folder / f"judge-{shard}")

        def example(which: int) -> tuple[Conversation, Verdict]:
            number = int(done.touched[which])
            row, place = rows[number], int(places[number])
            left = None if place < 0 else row if place == rows.places[number] else self._shelf.row(place)
            return row, Verdict(left, whys[which]["why"])

        return Rows(self._shelf, places[places >= 0]), [Part(rows, [done], example)]

    def _tell(self, name: str, part: Part, of: str) -> None:
        step, account = self.steps[name], self.accounts[name]
        account.rows = (
            max(account.rows, len(part.rows)) if step.after_split else account.rows + sum(d.rows for d in part.did)
        )
        before = len(self._ledger.removed)
        touched = 0
        for did in part.did:
            account.changed += did.changed
            account.removed += did.removed
            account.flagged += did.flagged
            account.found.update(did.found)
            touched += len(did.touched)
            self._ledger.add(did.ledger)
        wanted = min(EXAMPLES - len(account.examples), touched)
        drawn = [part.example(i * touched // wanted) for i in range(wanted)]
        account.examples += [_example(row, verdict, self.hide) for row, verdict in drawn]
        account.note = step.note
        if len(part.rows):
            removed = ((entry["row"], entry["why"]) for entry in self._ledger.removed.after(before))
            account.tables |= {title + of: table for title, table in step.tell(part.rows, removed).items() if table}


def _at(arrays: Sequence[np.ndarray], which: int) -> int:
    """An element of arrays that lie one after the other."""
    for one in arrays:
        if which < len(one):
            return int(one[which])
        which -= len(one)
    raise IndexError(which)


def _example(row: Conversation, verdict: Verdict, hide: Callable[[str], str]) -> dict[str, str]:
    told = {"row": row.id, "why": hide(verdict.why)}
    if verdict.row is None or verdict.row is row:
        whole = "\n".join([f"{m.role}: {m.content}" for m in row.messages] or texts(row))
        return told | {"did": "flagged" if verdict.row else "removed", "before": hide(whole)[:SHOWN]}
    # The first text that differs, from a little before the place; hidden whole, since a cut may hide what to hide.
    old, new = next(
        ((a, b) for a, b in zip(texts(row), texts(verdict.row), strict=False) if a != b), ("\n".join(texts(row)), "")
    )
    start = max(next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), 0) - AROUND, 0)
    return told | {
        "did": "changed",
        "before": hide(old)[start : start + SHOWN],
        "after": hide(new)[start : start + SHOWN],
    }
