"""Where every row went: read + made = accepted + rejected + removed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.conversation.message import Conversation
from tunesmith.errors import DataError

NAMED_AT_MOST = 5


@dataclass
class Ledger:
    """Every row that was read, by what became of it."""

    read: int = 0
    made: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    removed: list[dict[str, Any]] = field(default_factory=list)
    cut: list[dict[str, str]] = field(default_factory=list)
    flagged: list[dict[str, Any]] = field(default_factory=list)

    def reject(self, where: str, reason: str, why: str, text: str) -> None:
        self.rejected.append({"row": where, "reason": reason, "why": why, "text": text})

    def remove(self, row: Conversation | None, where: str, step: str, why: str) -> None:
        self.removed.append({"row": where, "step": step, "why": why} | (row.as_dict() if row else {}))

    def flag(self, row: Conversation, step: str, why: str) -> None:
        """List a row for a person to look at; it stays among the others."""
        self.flagged.append({"row": row.id, "step": step, "why": why} | row.as_dict())

    @property
    def steps(self) -> dict[str, int]:
        """How many rows each step removed."""
        return dict(Counter(row["step"] for row in self.removed))

    def balance(self, accepted: int) -> None:
        """Hold that no row went missing."""
        if self.read + self.made != accepted + len(self.rejected) + len(self.removed):
            raise AssertionError(f"rows went missing: {self.read} read, {accepted} accepted")


def named(rows: Sequence[dict[str, Any]]) -> str:
    """The first rows and what is wrong with each, a line apiece."""
    lines = [f"  {row['row']}: {row['why']}" for row in rows[:NAMED_AT_MOST]]
    more = len(rows) - NAMED_AT_MOST
    return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))


def too_many_rejected(allowed: float, read: int, rejected: Sequence[dict[str, Any]]) -> DataError | None:
    """The error of a set of which a larger share than `allowed` can't be used."""
    if len(rejected) <= allowed * read:
        return None
    share = min(1.0, max(0.01, -(-100 * len(rejected) // read) / 100))
    return DataError(
        f"{len(rejected)} of {read} rows can't be used (data.max_rejected allows {allowed:.1%})\n{named(rejected)}",
        where=rejected[0]["row"],
        fix="Mend the rows, or name another file."
        if len(rejected) == read
        else f"Mend the rows, or go on without them: --set data.max_rejected={share:g}",
    )


def nothing_left(ledger: Ledger, held: dict[str, int]) -> DataError:
    """The error of a set of which no row is left to train on; `held` counts the rows held out, by part."""
    out = ledger.rejected + ledger.removed
    removed = ", ".join(f"{n} removed ({step})" for step, n in ledger.steps.items()) or "none removed"
    told = f"{ledger.read} rows read, {len(ledger.rejected)} rejected, {removed}"
    kept = ", ".join(f"{n} held out for {part}" for part, n in held.items() if n)
    return DataError(
        f"no row is left to train on: {told}{', ' + kept if kept else ''}" + (f"\n{named(out)}" if out else ""),
        where="data",
        fix="Hold out fewer rows (data.split)."
        if kept and not out
        else "Change what leaves those rows out, or mend them.",
    )
