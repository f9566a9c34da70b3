"""The recipe's cleaning steps, one after the other, each with an account of what it did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import Around, Step, Verdict
from tunesmith.data.clean.texts import texts
from tunesmith.data.layouts import Unusable
from tunesmith.data.ledger import Ledger

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
        tables: what else it tells, by name.
    """

    step: str
    settings: dict[str, Any]
    rows: int = 0
    changed: int = 0
    removed: int = 0
    flagged: int = 0
    found: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__) | {"found": dict(self.found.most_common())}


class Cleaning:
    """The steps of a recipe, and their accounts in the recipe's order."""

    def __init__(self, steps: Mapping[str, Step], usable: Callable[[Conversation], None], ledger: Ledger) -> None:
        """Args:
        usable: raises Unusable for a row that can't be learnt from; asked of every row that a step changed.
        """
        self.steps, self._usable, self._ledger = steps, usable, ledger
        self.accounts = {name: Account(name, step.model_dump(mode="json")) for name, step in steps.items()}

    def before_split(self, parts: dict[str, list[Conversation]], around: Around) -> dict[str, list[Conversation]]:
        """Each part's rows, cleaned on their own."""
        for name, step in self.steps.items():
            if not step.after_split:
                parts = {part: self._through(name, step, rows, around) for part, rows in parts.items()}
        return parts

    def after_split(self, rows: list[Conversation], around: Around) -> list[Conversation]:
        """The training rows, held against those that are held out."""
        for name, step in self.steps.items():
            if step.after_split:
                rows = self._through(name, step, rows, around)
        return rows

    def hide(self, text: str) -> str:
        """A text as it may be written beside the rows: without what the recipe wants nobody to read."""
        for step in self.steps.values():
            text = step.hide(text)
        return text

    def _through(self, name: str, step: Step, rows: Sequence[Conversation], around: Around) -> list[Conversation]:
        account = self.accounts[name]
        verdicts = [self._checked(v) for v in step.apply(rows, around)] if rows else []
        kept, touched = [], []
        for row, verdict in zip(rows, verdicts, strict=True):
            account.found.update(verdict.found)
            if verdict.row is None:
                self._ledger.remove(row, row.id, name, verdict.why)
            else:
                kept.append(verdict.row)
                if verdict.row is row and verdict.why:
                    self._ledger.flag(row, name, verdict.why)
            if verdict.row is not row or verdict.why:
                touched.append((row, verdict))
        account.rows = max(account.rows, len(rows)) if step.after_split else account.rows + len(rows)
        account.removed += len(rows) - len(kept)
        account.changed += sum(v.row is not None and v.row is not row for row, v in touched)
        account.flagged += sum(v.row is row for row, v in touched)
        wanted = min(EXAMPLES - len(account.examples), len(touched))
        drawn = [touched[i * len(touched) // wanted] for i in range(wanted)]
        account.examples += [_example(row, verdict, self.hide) for row, verdict in drawn]
        for title, table in step.tell(rows, verdicts).items():
            account.tables.setdefault(title, []).extend(table)
        return kept

    def _checked(self, verdict: Verdict) -> Verdict:
        if verdict.row is not None and verdict.why:
            try:
                self._usable(verdict.row)
            except Unusable as error:
                return Verdict(None, f"{verdict.why}; then {error.why}", verdict.found)
        return verdict


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
