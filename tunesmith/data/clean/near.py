"""Which rows say the same, of any number of rows: keys of each row are made by any process, lie on disk, and are joined
by the engine.

Of each row memory holds what groups are made of, less than a hundred bytes. Word runs and MinHash bands lie in files,
one a piece of rows; runs are read again only for rows that share a band. Where many share one, they are told apart by
their rarest runs (`crowd.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean import minhash
from tunesmith.data.clean.crowd import AT_ONCE, Rarest, Some, stretches, taken
from tunesmith.data.clean.texts import media_of, text_of
from tunesmith.data.engines.engine import Running
from tunesmith.data.groups import DIGEST, Groups, digest, same
from tunesmith.data.shelf import in_chunks

CROWD = 64  # rows that share a band and are all compared with one another
HEADS = 64  # rows of a crowd that the others are compared with, of those that share one of their rarest runs
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
        texts = [text_of(row, self.side) for row in item[1]]
        flat, ends = minhash.hashes_of(texts)
        spans = zip(texts, _spans(ends), strict=True)
        told = b"".join(digest(flat[begin:end] if end > begin else text) for text, (begin, end) in spans)
        lengths = np.array([len(text) for text in texts], dtype=np.int32)
        return Keys(np.frombuffer(told, dtype=DIGEST), lengths, np.empty(0, dtype=np.int64))


@dataclass(frozen=True)
class Sketch:
    """Makes keys by which rows have the same runs of words, and writes the runs and their MinHash bands to files. The
    item is (the number of the first row, rows). Runs in `template` don't count."""

    side: Side
    words: int
    threshold: float
    folder: Path
    template: np.ndarray = field(default_factory=lambda: minhash.NONE)

    def __call__(self, item: tuple[int, Sequence[Conversation]]) -> Keys:
        import pyarrow as pa
        import pyarrow.parquet as pq

        first, rows = item
        texts, media = zip(*((text_of(row, self.side), media_of(row)) for row in rows), strict=True)
        flat, ends = minhash.without(*minhash.runs_of(texts, self.words), self.template)
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
        told = b"".join(digest(flat[begin:end]) if end > begin else bytes(16) for begin, end in _spans(ends))
        lengths = np.array([len(text) for text in texts], dtype=np.int32)
        return Keys(np.frombuffer(told, dtype=DIGEST), lengths, ends)


def _spans(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """(begin, end) of each text's hashes."""
    return pairwise([0, *ends.tolist()])


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
    """Rows' runs of words, read from files where rows are to be compared."""

    def __init__(self, folder: Path, keys: Sequence[Keys]) -> None:
        self._folder = folder
        self._firsts = np.cumsum([0, *(len(k.lengths) for k in keys)])
        self._ends = [np.concatenate([[0], k.ends]) for k in keys]
        counts = [np.diff(ends) for ends in self._ends]
        self._counts = np.concatenate([np.empty(0, dtype=np.int64), *counts]).astype(np.int32)

    def alike(self, one: np.ndarray, other: np.ndarray, threshold: float) -> np.ndarray:
        """Whether the runs of one row and of the other, as sets, have a Jaccard similarity of at least `threshold`;
        for each pair of rows, by number. bool."""
        found = np.zeros(len(one), dtype=bool)
        for part in stretches(self._counts[one] + self._counts[other], AT_ONCE):  # as many pairs as take some megabytes
            found[part] = self._similar(one[part], other[part]) >= threshold - 1e-12
        return found

    def rarest(self, rows: np.ndarray, threshold: float, engine: Running) -> list[Path]:
        """Files of keys that rows of a crowd (numbers that rise) share where they are alike (`Rarest`)."""
        some = max(min(len(rows), int(AT_ONCE / self._counts[rows].mean())), 1)
        sample, _ = self._read(rows[np.linspace(0, len(rows) - 1, some).astype(int)])
        items = [Some(*place) for place in self._places(rows)]
        return list(engine.map(Rarest(threshold, np.sort(sample)), items, len(rows)))

    def _similar(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Jaccard similarity of each pair of rows. Runs are mixed with the number of their pair and sorted: equal ones
        of one row stand together, and beside them those of the other row, which differ in the last bit alone."""
        rows, which = np.unique(np.concatenate([one, other]), return_inverse=True)
        flat, ends = self._read(rows)
        counts = self._counts[rows].astype(np.int64)[which]
        inside = np.arange(counts.sum()) + np.repeat(ends[which] - np.cumsum(counts), counts)
        pair = np.repeat(np.tile(np.arange(len(one)), 2), counts)
        side = np.arange(len(pair)) >= counts[: len(one)].sum()
        keys = minhash.stirred(flat[inside] + pair.astype(np.uint64) * minhash.MIX[0])
        keys = (keys | np.uint64(1)) ^ side
        order = np.argsort(keys)
        keys, pair = keys[order], pair[order]
        once = np.concatenate([[True], keys[1:] != keys[:-1]])
        keys, pair = keys[once], pair[once]
        both = np.concatenate([[False], keys[1:] | np.uint64(1) == keys[:-1] | np.uint64(1)])
        shared = np.bincount(pair[both], minlength=len(one))
        return shared / np.maximum(np.bincount(pair, minlength=len(one)) - shared, 1)

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The runs of rows (numbers that rise), one row's after another's; and where each one's end."""
        flat = [np.empty(0, dtype=np.uint64)]
        for path, _, starts, ends in self._places(rows):
            if (ends > starts).any():
                flat.append(taken(np.memmap(path, dtype=np.uint64, mode="r"), starts, ends)[0])
        return np.concatenate(flat), np.cumsum(self._counts[rows], dtype=np.int64)

    def _places(self, rows: np.ndarray) -> Iterator[tuple[Path, np.ndarray, np.ndarray, np.ndarray]]:
        """Where the runs of rows (numbers that rise) lie: (a file, the rows that are in it, where each one's start, and
        where they end)."""
        pieces, cuts = np.unique(np.searchsorted(self._firsts, rows, "right") - 1, return_index=True)
        for piece, some in zip(pieces.tolist(), np.split(rows, cuts[1:]), strict=True):
            first, ends = int(self._firsts[piece]), self._ends[piece]
            yield runs_of(self._folder, first), some, ends[some - first], ends[some - first + 1]


def nearly_same(keys: Sequence[Keys], threshold: float, folder: Path, engine: Running) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first of its group: rows that are alike, directly or through others, int64; and whether it was
    compared with some only of those that it might be like, bool."""
    leaders = same(np.concatenate([k.digests for k in keys]))
    groups = Groups(len(leaders), leaders)
    first = leaders == np.arange(len(leaders))  # rows of the same runs need no comparison, however many there are
    runs, at = Runs(folder, keys), 0
    bands = []
    for piece in keys:
        bands.append(bands_of(folder, at))
        at += len(piece.lengths)
    crowded, partly = np.zeros((2, len(leaders)), dtype=bool)
    for rows, sizes in engine.groups(bands):
        number = np.repeat(np.arange(len(sizes)), sizes)[first[rows]]
        rows = rows[first[rows]]
        many = np.bincount(number)[number] > CROWD
        crowded[rows[many]] = True
        _join(rows[~many], number[~many], np.ones(len(rows), dtype=bool)[~many], groups, runs, threshold)
    if crowded.any():
        for rows, sizes in engine.groups(runs.rarest(np.flatnonzero(crowded), threshold, engine)):
            number = np.repeat(np.arange(len(sizes)), sizes)
            order = np.lexsort((rows, 1 - rows % 2, number))  # those that may be the smaller of two come first
            rows, leads = rows[order] // 2, rows[order] % 2 == 1
            partly[rows[(np.bincount(number, leads) > HEADS)[number]]] = True
            place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            _join(rows, number, leads & (place < HEADS), groups, runs, threshold)
    return groups.leaders(), partly


def _join(
    rows: np.ndarray, number: np.ndarray, leads: np.ndarray, groups: Groups, runs: Runs, threshold: float
) -> None:
    """Join what is alike of rows that share a key; `number` is that of each one's key, whose rows stand together. The
    first row of each key is held against the others, then the second, and so on for as long as they lead."""
    while len(rows):
        heads = np.diff(number, prepend=-1) > 0
        starts, led = np.flatnonzero(heads), groups.of(rows)
        several = np.minimum.reduceat(led, starts) != np.maximum.reduceat(led, starts)  # not all one group yet
        left = np.repeat(leads[starts] & several, np.diff(np.append(starts, len(rows))))
        rows, number, leads, heads = rows[left], number[left], leads[left], heads[left]
        one, other = np.repeat(rows[heads], np.diff(np.flatnonzero(np.append(heads, True))) - 1), rows[~heads]
        apart = groups.of(one) != groups.of(other)
        one, other = one[apart], other[apart]
        alike = runs.alike(one, other, threshold)
        for i, j in zip(one[alike].tolist(), other[alike].tolist(), strict=True):
            groups.join(i, j)
        rows, number, leads = rows[~heads], number[~heads], leads[~heads]
