"""Which rows say the same, of any number of rows: keys of each row are made by any process, lie on disk, and are joined
by the engine.

Of each row memory holds what groups are made of, less than a hundred bytes. Word runs and MinHash bands lie in files,
one a piece of rows; runs are read again only for rows that share a band.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean import minhash
from tunesmith.data.clean.texts import media_of, text_of
from tunesmith.data.engines.engine import Running
from tunesmith.data.groups import DIGEST, Groups, digest, same
from tunesmith.data.shelf import CHUNK, in_chunks

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
    item is (the number of the first row, rows)."""

    side: Side
    words: int
    threshold: float
    folder: Path

    def __call__(self, item: tuple[int, Sequence[Conversation]]) -> Keys:
        import pyarrow as pa
        import pyarrow.parquet as pq

        first, rows = item
        texts = [text_of(row, self.side) for row in rows]
        sets = [_apart(s, row) for s, row in zip(minhash.shingles(texts, self.words), rows, strict=True)]
        keys = minhash.band_keys(sets, self.threshold).view(np.int64)
        columns = {"row": np.arange(first, first + len(sets))}
        columns |= {f"band{number:03}": column for number, column in enumerate(keys.T)}
        some = np.array([len(s) > 0 for s in sets], dtype=bool)  # a text without words is like no other
        table = pa.table({name: np.ascontiguousarray(column[some]) for name, column in columns.items()})
        pq.write_table(table, bands_of(self.folder, first), compression="none", use_dictionary=False)
        np.concatenate([np.empty(0, dtype=np.uint64), *sets]).tofile(runs_of(self.folder, first))
        told = b"".join(digest(s) if len(s) else bytes(16) for s in sets)
        return Keys(
            np.frombuffer(told, dtype=DIGEST),
            np.array([len(text) for text in texts], dtype=np.int32),
            np.cumsum([len(s) for s in sets]),
        )


def _apart(runs: minhash.Shingles, row: Conversation) -> minhash.Shingles:
    """A row's runs, so that rows with other images or sounds share none."""
    media = media_of(row)
    return np.sort(runs ^ np.frombuffer(digest(media), dtype=np.uint64)[0]) if media else runs


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
    """Rows' runs of words, read from files when they are asked for."""

    def __init__(self, folder: Path, keys: Sequence[Keys]) -> None:
        self._folder, self._ends = folder, [np.concatenate([[0], k.ends]) for k in keys]
        self._firsts = np.cumsum([0, *(len(k.lengths) for k in keys)])
        self._kept: dict[int, np.ndarray] = {}

    def __getitem__(self, row: int) -> np.ndarray:
        if row not in self._kept:
            if len(self._kept) >= CHUNK:
                self._kept.clear()
            piece = int(np.searchsorted(self._firsts, row, "right")) - 1
            ends, first = self._ends[piece], int(self._firsts[piece])
            start, end = int(ends[row - first]), int(ends[row - first + 1])
            with runs_of(self._folder, first).open("rb", buffering=0) as file:
                self._kept[row] = np.frombuffer(os.pread(file.fileno(), 8 * (end - start), 8 * start), dtype=np.uint64)
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
    for found in engine.groups(bands):
        members = np.sort(found[first[found]]).tolist()
        for place, i in enumerate(members):
            for j in members[place + 1 :]:
                if groups.leader(i) != groups.leader(j) and minhash.alike(runs[i], runs[j], threshold):
                    groups.join(i, j)
    return groups.leaders()
