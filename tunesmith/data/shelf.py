"""Rows on disk, of any number: what the data stage works with in place of lists of rows.

A shelf is a folder of shards. A shard is a file of rows as JSON, a line each, and a file of where each line ends
(int64), so that any row can be had without those before it. A row's place is one number, `shard << 40 | line`. Rows are
a shelf and an array of places: leaving rows out, or putting them into another order, is a change of that array, and a
changed row is a new line elsewhere. So memory holds eight bytes a row. Shards are never written twice, and any process
can write one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from tunesmith.conversation.message import Conversation, row_from_dict
from tunesmith.runs import json_line

CHUNK = 8192  # rows that one process looks at before it tells of them
LINE_BITS = 40
BLOCK = 2**21  # bytes read at once
GAP = 64  # lines that are read in vain rather than asked for apart
OPEN = 64

Places = np.ndarray  # int64
_decode = json.JSONDecoder().raw_decode  # lines are our own: nothing stands before or behind the object


@lru_cache(OPEN)
def _ends(path: Path) -> np.ndarray:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.fromfile(path, dtype=np.int64)])


@lru_cache(OPEN)
def _file(path: Path) -> BinaryIO:
    return path.open("rb", buffering=0)  # closed once it is forgotten


def _encoded(row: Conversation) -> bytes:
    return json_line(row.as_dict()).encode("utf-8", "surrogatepass")


def decoded(line: bytes) -> Conversation:
    """A row from its line."""
    return row_from_dict(_decode(line.decode("utf-8", "surrogatepass"))[0])


class Writer:
    """Adds rows to a shard of its own."""

    def __init__(self, folder: Path, number: int) -> None:
        self._first = number << LINE_BITS
        self._rows = (folder / f"{number:08}.rows").open("wb")
        self._ends = (folder / f"{number:08}.ends").open("wb")
        self._end, self.count, self._told = 0, 0, bytearray()

    def add(self, row: Conversation) -> int:
        """The row's place."""
        self._end += self._rows.write(_encoded(row))
        self._told += self._end.to_bytes(8, "little")
        if len(self._told) > 2**16:
            self._ends.write(self._told)
            self._told.clear()
        self.count += 1
        return self._first + self.count - 1

    @property
    def places(self) -> Places:
        """The places of all rows so far."""
        return np.arange(self._first, self._first + self.count, dtype=np.int64)

    def close(self) -> None:
        self._ends.write(self._told)
        self._ends.close()
        self._rows.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@dataclass
class Shelf:
    """A folder of shards. One process numbers them; whoever is given a number writes that shard."""

    folder: Path
    shards: int = 0

    def number(self) -> int:
        """A number for one more shard."""
        self.shards += 1
        return self.shards - 1

    def writer(self, number: int | None = None) -> Writer:
        return Writer(self.folder, self.number() if number is None else number)

    def put(self, rows: Iterable[Conversation]) -> Rows:
        """Rows, laid down."""
        with self.writer() as writer:
            places = np.fromiter((writer.add(row) for row in rows), dtype=np.int64)
        return Rows(self, places)

    def take(self, file: Path) -> Rows:
        """The rows of a file that was written from a shelf; they stay where they lie."""
        number = self.number()
        (self.folder / f"{number:08}.rows").symlink_to(file.resolve())
        with file.open("rb") as lines:
            ends = np.fromiter(accumulate(map(len, lines)), dtype=np.int64)
        ends.tofile(self.folder / f"{number:08}.ends")
        return Rows(self, np.arange(len(ends), dtype=np.int64) + (number << LINE_BITS))

    def row(self, place: int) -> Conversation:
        return decoded(next(self.lines(np.array([place], dtype=np.int64))))

    def lines(self, places: Places) -> Iterator[bytes]:
        """The lines at these places, in their order; what lies close together is read together."""
        for start, end in _together(places):
            shard, lines = int(places[start]) >> LINE_BITS, places[start:end] & ((1 << LINE_BITS) - 1)
            ends = _ends(self.folder / f"{shard:08}.ends")
            file, at = _file(self.folder / f"{shard:08}.rows"), 0
            while at < len(lines):
                begin = int(ends[lines[at]])
                upto = max(int(np.searchsorted(ends[lines[at:] + 1], begin + BLOCK, "right")), 1) + at
                some = lines[at:upto]
                block = os.pread(file.fileno(), int(ends[some[-1] + 1]) - begin, begin)
                stretches = zip((ends[some] - begin).tolist(), (ends[some + 1] - begin).tolist(), strict=True)
                for first, last in stretches:
                    yield block[first:last]
                at = upto


def _together(places: Places) -> Iterator[tuple[int, int]]:
    """Stretches of places that rise within one shard without wide gaps."""
    for begin in range(0, len(places), CHUNK):
        part = places[begin : begin + CHUNK]
        steps = np.diff(part)
        cuts = np.flatnonzero((steps <= 0) | (steps > GAP)) + 1
        edges = [0, *cuts.tolist(), len(part)]
        for start, end in pairwise(edges):
            yield begin + start, begin + end


class Rows(Sequence[Conversation]):
    """Rows of a shelf, as a sequence: each is read when it is looked at, and none is kept."""

    def __init__(self, shelf: Shelf, places: Places | None = None) -> None:
        self.shelf = shelf
        self.places = np.empty(0, dtype=np.int64) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, which: int) -> Conversation: ...
    @overload
    def __getitem__(self, which: slice | np.ndarray) -> Rows: ...
    def __getitem__(self, which: int | slice | np.ndarray) -> Conversation | Rows:
        if isinstance(which, slice | np.ndarray):
            return Rows(self.shelf, self.places[which])
        return self.shelf.row(self.places[which])  # an index out of range is an IndexError here

    def __iter__(self) -> Iterator[Conversation]:
        return map(decoded, self.lines())

    def lines(self) -> Iterator[bytes]:
        """The rows as JSON lines."""
        return self.shelf.lines(self.places)

    def __add__(self, others: Rows) -> Rows:
        return Rows(self.shelf, np.concatenate([self.places, others.places]))

    def chunks(self) -> list[Rows]:
        """The rows in pieces that a process can take each."""
        return [self[start : start + CHUNK] for start in range(0, len(self), CHUNK)]


def joined(pieces: Iterable[Rows], shelf: Shelf) -> Rows:
    """Rows of one shelf, one after the other."""
    return Rows(shelf, np.concatenate([np.empty(0, dtype=np.int64), *(p.places for p in pieces)]))


def in_chunks(rows: Sequence[Conversation]) -> list[Sequence[Conversation]]:
    """Rows of any kind of sequence in pieces that a process can take each."""
    if isinstance(rows, Rows):
        return list(rows.chunks())
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def grouped(rows: Rows, key: Callable[[Conversation], Any]) -> dict[Any, np.ndarray]:
    """Indices of rows by what `key` says of them, in the order in which its values come."""
    known: dict[Any, int] = {}
    which = np.fromiter((known.setdefault(key(row), len(known)) for row in rows), dtype=np.int64, count=len(rows))
    return {value: np.flatnonzero(which == number) for value, number in known.items()}
