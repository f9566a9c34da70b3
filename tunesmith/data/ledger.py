"""Where every row went: read + made = accepted + rejected + removed."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

from tunesmith.conversation.message import Conversation
from tunesmith.data.marks import bare
from tunesmith.errors import DataError
from tunesmith.runs import json_line

NAMED_AT_MOST = 5
IN_MEMORY = 2**22
BLOCK = 2**18
LISTS = ("rejected", "removed", "cut", "flagged")


class Entries:
    """What is told of rows, a mapping each, in order; in a file without a name once it is more than a few megabytes."""

    def __init__(self, folder: Path | None = None) -> None:
        self._file = SpooledTemporaryFile(IN_MEMORY, dir=str(folder) if folder else None)  # noqa: SIM115
        self._count = 0

    def append(self, entry: dict[str, Any]) -> None:
        self._file.seek(0, 2)
        self._file.write(json_line(entry).encode("utf-8", "surrogatepass"))
        self._count += 1

    def save(self, path: Path) -> None:
        self._file.seek(0)
        with path.open("wb") as file:
            shutil.copyfileobj(self._file, file)

    def take(self, path: Path, count: int) -> None:
        """Add what another process saved, and delete its file."""
        self._file.seek(0, 2)
        with path.open("rb") as file:
            shutil.copyfileobj(file, self._file)
        path.unlink()
        self._count += count

    def __len__(self) -> int:
        return self._count

    def lines(self) -> Iterator[bytes]:
        at = 0
        while True:
            self._file.seek(at)
            block = self._file.readlines(BLOCK)
            if not block:
                return
            at = self._file.tell()
            yield from block

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(_parsed, self.lines())

    def __getitem__(self, which: int) -> dict[str, Any]:
        return next(self.after(which))

    def after(self, count: int) -> Iterator[dict[str, Any]]:
        """All but the first `count`."""
        return map(_parsed, islice(self.lines(), count, None))

    def first(self, count: int) -> list[dict[str, Any]]:
        return list(islice(self, count))


def _parsed(line: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
    return entry


@dataclass(frozen=True)
class Saved:
    """A ledger that another process kept: its counts, and where its lists lie."""

    read: int
    made: Counter[str]
    steps: Counter[str]
    lists: dict[str, tuple[Path, int]]


@dataclass
class Ledger:
    """Every row that was read, by what became of it.

    Attributes:
        folder: where long lists go; the system's folder for such files if not given.
        made: how many rows each step added.
        steps: how many rows each step removed.
    """

    folder: Path | None = None
    read: int = 0
    made: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rejected, self.removed, self.cut, self.flagged = (Entries(self.folder) for _ in LISTS)

    def reject(self, where: str, reason: str, why: str, text: str) -> None:
        self.rejected.append({"row": where, "reason": reason, "why": why, "text": text})

    def remove(self, row: Conversation | None, where: str, step: str, why: str) -> None:
        self.removed.append({"row": where, "step": step, "why": why} | (bare(row).as_dict() if row else {}))
        self.steps[step] += 1

    def flag(self, row: Conversation, step: str, why: str) -> None:
        """List a row for a person to look at; it stays among the others."""
        self.flagged.append({"row": row.id, "step": step, "why": why} | bare(row).as_dict())

    def save(self, stem: Path) -> Saved:
        """Put it where another process can take it from: files that begin with `stem`."""
        lists = {}
        for name in LISTS:
            entries: Entries = getattr(self, name)
            if len(entries):
                path = stem.with_name(f"{stem.name}.{name}")
                entries.save(path)
                lists[name] = (path, len(entries))
        return Saved(self.read, self.made, self.steps, lists)

    def add(self, saved: Saved) -> None:
        """Take over what another process kept."""
        self.read += saved.read
        self.made.update(saved.made)
        self.steps.update(saved.steps)
        for name, (path, count) in saved.lists.items():
            getattr(self, name).take(path, count)

    def balance(self, accepted: int) -> None:
        """Hold that no row went missing."""
        if self.read + self.made.total() != accepted + len(self.rejected) + len(self.removed):
            raise AssertionError(f"rows went missing: {self.read} read, {accepted} accepted")


def named(rows: list[dict[str, Any]], count: int) -> str:
    """The first of `count` rows and what is wrong with each, a line apiece."""
    lines = [f"  {row['row']}: {row['why']}" for row in rows[:NAMED_AT_MOST]]
    more = count - len(lines)
    return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))


def too_many_rejected(allowed: float, read: int, rejected: Entries | Sequence[dict[str, Any]]) -> DataError | None:
    """The error of a set of which a larger share than `allowed` can't be used."""
    if len(rejected) <= allowed * read:
        return None
    share = min(1.0, max(0.01, -(-100 * len(rejected) // read) / 100))
    first = list(islice(rejected, NAMED_AT_MOST))
    return DataError(
        f"{len(rejected)} of {read} rows can't be used (data.max_rejected allows {allowed:.1%})\n"
        f"{named(first, len(rejected))}",
        where=first[0]["row"],
        fix="Mend the rows, or name another file."
        if len(rejected) == read
        else f"Mend the rows, or go on without them: --set data.max_rejected={share:g}",
    )


def nothing_left(ledger: Ledger, held: dict[str, int]) -> DataError:
    """The error of a set of which no row is left to train on; `held` counts the rows held out, by part."""
    count = len(ledger.rejected) + len(ledger.removed)
    out = (ledger.rejected.first(NAMED_AT_MOST) + ledger.removed.first(NAMED_AT_MOST))[:NAMED_AT_MOST]
    removed = ", ".join(f"{n} removed ({step})" for step, n in ledger.steps.items()) or "none removed"
    told = f"{ledger.read} rows read, {len(ledger.rejected)} rejected, {removed}"
    kept = ", ".join(f"{n} held out for {part}" for part, n in held.items() if n)
    return DataError(
        f"no row is left to train on: {told}{', ' + kept if kept else ''}" + (f"\n{named(out, count)}" if out else ""),
        where="data",
        fix="Hold out fewer rows (data.split)."
        if kept and not out
        else "Change what leaves those rows out, or mend them.",
    )
