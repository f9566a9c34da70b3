"""Which rows ask nearly the same, so that no split has such rows on two sides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tunesmith.data.clean import near
from tunesmith.data.clean.minhash import shingles
from tunesmith.data.clean.texts import text_of
from tunesmith.data.engines.engine import Running
from tunesmith.data.shelf import Places, Rows

WORDS = 3  # in a run
LOOKED_AT = 2000


@dataclass(frozen=True)
class Alike:
    """Groups of rows whose questions are alike, directly or through others.

    Attributes:
        places: of the rows that are like another, rising.
        groups: the number of each one's group.
    """

    places: Places
    groups: np.ndarray

    def of(self, rows: Rows) -> np.ndarray:
        """Each row's group, int64; -1 for a row that is like no other."""
        if not len(self.places):
            return np.full(len(rows), -1, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.places, rows.places), len(self.places) - 1)
        return np.where(self.places[at] == rows.places, self.groups[at], -1)


def alike(rows: Rows, threshold: float, engine: Running, scratch: Path | None) -> Alike:
    """Rows whose questions have a Jaccard similarity of at least `threshold` in runs of three words. Runs that many
    rows have are a template's and don't count: all rows of it would be one group."""
    with TemporaryDirectory(dir=scratch) as name:
        sketch = near.Sketch("prompt", WORDS, threshold, Path(name), common(rows))
        leaders = near.nearly_same(near.keys_of(rows, sketch, engine), threshold, Path(name), engine)
    several = np.flatnonzero(np.bincount(leaders, minlength=len(rows))[leaders] > 1)
    several = several[np.argsort(rows.places[several])]
    return Alike(rows.places[several], leaders[several])


def common(rows: Rows) -> np.ndarray:
    """Runs that a tenth of the rows have, as hashes: of a small set half of the rows, or fifty. Of many rows some are
    looked at, evenly spread."""
    some = rows[np.unique(np.linspace(0, len(rows) - 1, min(len(rows), LOOKED_AT)).astype(np.int64))]
    runs = shingles([text_of(row, "prompt") for row in some], WORDS)
    found, counts = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *runs]), return_counts=True)
    return found[counts >= max(len(some) / 10, min(50, len(some) / 2), 10)]
