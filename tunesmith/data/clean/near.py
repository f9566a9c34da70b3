"""Which rows say the same, of any number of rows: keys of each row are made by any process, lie on disk, and are joined
by the engine.

Of each row memory holds what groups are made of, less than a hundred bytes. Word runs and MinHash bands lie in files,
one a piece of rows; runs are read again only for rows that share a band.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean import minhash
from tunesmith.data.clean.texts import media_of, text_of
from tunesmith.data.engines.engine import Running
from tunesmith.data.groups import DIGEST, Groups, digest, same
from tunesmith.data.shelf import CHUNK, in_chunks

OPEN = 64  # files of runs
Side = Literal["prompt", "answer", "both"]


@dataclass(frozen=True)
class Keys:
    """Keys of some rows: of what each says, of a side.

    Attributes:
        digests: equal for rows that say the same, dtype DIGEST; zero for a row that is like no other.
        lengths: of the texts, in characters.
        ends: where each row's runs end in the file of runs, counted in runs; for near-duplicates.
    """

    digests: np.ndarray
    lengths: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Exact:
    """Makes keys by which rows are the same words, whatever the case, spacing and punctuation."""

    side: Side

    def __call__(self, item: tuple[int, Sequence[Conversation]]) -> Keys:
        told, lengths = bytearray(), []
        for row in item[1]:
            text = text_of(row, self.side)
            told += digest(minhash.normalised(text) or text)
            lengths.append(len(text))
        return Keys(np.frombuffer(told, dtype=DIGEST), np.array(lengths, dtype=np.int32), np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class Sketch:
    """Makes keys by which rows have the same runs of words, and writes the runs and their MinHash bands to files. The
    item is (the number of the first row, rows). Runs in `common` don't count."""

    side: Side
    words: int
    threshold: float
    folder: Path
    common: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.uint64))

    def __call__(self, item: tuple[int, Sequence[Conversation]]) -> Keys:
        import pyarrow as pa
        import pyarrow.parquet as pq

        first, rows = item
        texts, media = zip(*((text_of(row, self.side), media_of(row)) for row in rows), strict=True)
        flat, ends = minhash.runs_of(texts, self.words)
        if len(self.common):
            counted = ~np.isin(flat, self.common)
            flat, ends = flat[counted], np.concatenate([[0], np.cumsum(counted)])[ends]
        starts = np.concatenate([[0], ends[:-1]])
        for number in (number for number, held in enumerate(media) if held):  # rows with other images share no run
            flat[starts[number] : ends[number]] ^= np.frombuffer(digest(media[number]), dtype=np.uint64)[0]
        keys = minhash.band_keys(flat, ends, self.threshold).view(np.int64)
        columns = {"row": np.arange(first, first + len(ends))}
        columns |= {f"band{number:03}": column for number, column in enumerate(keys.T)}
        some = ends > starts  # a text without words is like no other
        table = pa.table({name: np.ascontiguousarray(column[some]) for name, column in columns.items()})
        pq.write_table(table, bands_of(self.folder, first), compression="none", use_dictionary=False)
        flat.tofile(runs_of(self.folder, first))
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        told = b"".join(digest(flat[begin:end]) if end > begin else bytes(16) for begin, end in spans)
        lengths = np.array([len(text) for text in texts], dtype=np.int32)
        return Keys(np.frombuffer(told, dtype=DIGEST), lengths, ends)


def bands_of(folder: Path, first: int) -> Path:
    return folder / f"bands-{first:012}.parquet"


def runs_of(folder: Path, first: int) -> Path:
    return folder / f"runs-{first:012}"


def keys_of(rows: Sequence[Conversation], work: Exact | Sketch, engine: Running) -> list[Keys]:
    """The keys of all rows, a piece at a time."""
    items, first = [], 0
    for piece in in_chunks(rows):
        items.append((first, piece))
        first += len(piece)
    return list(engine.map(work, items, len(rows)))


class Runs:
    """Rows' runs of words as sets, read from files when they are asked for."""

    def __init__(self, folder: Path, keys: Sequence[Keys]) -> None:
        self._folder, self._ends = folder, [np.concatenate([[0], k.ends]) for k in keys]
        self._firsts = np.cumsum([0, *(len(k.lengths) for k in keys)])
        self._kept: dict[int, np.ndarray] = {}
        self._open = lru_cache(OPEN)(self._file)

    def _file(self, piece: int) -> BinaryIO:
        return runs_of(self._folder, int(self._firsts[piece])).open("rb", buffering=0)  # closed once it is forgotten

    def __getitem__(self, row: int) -> np.ndarray:
        if row not in self._kept:
            if len(self._kept) >= CHUNK:
                self._kept.clear()
            piece = int(np.searchsorted(self._firsts, row, "right")) - 1
            ends, at = self._ends[piece], row - int(self._firsts[piece])
            start, end = int(ends[at]), int(ends[at + 1])
            held = os.pread(self._open(piece).fileno(), 8 * (end - start), 8 * start)
            self._kept[row] = minhash.distinct(np.frombuffer(held, dtype=np.uint64))
        return self._kept[row]


def nearly_same(keys: Sequence[Keys], threshold: float, folder: Path, engine: Running) -> np.ndarray:
    """For each row the first of its group: rows that are alike, directly or through others. int64."""
    leaders = same(np.concatenate([k.digests for k in keys]))
    groups = Groups(len(leaders))
    for i in np.flatnonzero(leaders != np.arange(len(leaders))).tolist():
        groups.join(int(leaders[i]), i)
    first = leaders == np.arange(len(leaders))  # rows of the same runs need no comparison, however many there are
    runs, at = Runs(folder, keys), 0
    bands = []
    for piece in keys:
        bands.append(bands_of(folder, at))
        at += len(piece.lengths)
    for rows, sizes in engine.groups(bands):
        for members in _apart(rows, sizes, first, groups.leaders()):
            left = len({groups.leader(i) for i in members})
            for i, j in combinations(members, 2):
                if left == 1:
                    break
                if groups.leader(i) != groups.leader(j) and minhash.alike(runs[i], runs[j], threshold):
                    groups.join(i, j)
                    left -= 1
    return groups.leaders()


def _apart(rows: np.ndarray, sizes: np.ndarray, first: np.ndarray, leaders: np.ndarray) -> Iterator[list[int]]:
    """Of groups of rows those that are not one group already, each with only the first of rows that are the same."""
    number = np.repeat(np.arange(len(sizes)), sizes)[first[rows]]
    rows = rows[first[rows]]
    starts = np.flatnonzero(np.concatenate([[True], number[1:] != number[:-1]])) if len(rows) else np.empty(0, np.int64)
    if not len(starts):
        return
    led, ends = leaders[rows], np.concatenate([starts[1:], [len(rows)]])
    several = np.minimum.reduceat(led, starts) != np.maximum.reduceat(led, starts)
    for start, end in zip(starts[several].tolist(), ends[several].tolist(), strict=True):
        yield np.sort(rows[start:end]).tolist()
