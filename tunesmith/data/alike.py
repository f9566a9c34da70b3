"""Which rows ask nearly the same, so that no split has such rows on two sides; and what rows share because one template
made them, which says nothing of any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np

from tunesmith.data.clean import near
from tunesmith.data.clean.minhash import NONE, normalised, runs_of, shingles, words_of
from tunesmith.data.clean.texts import text_of
from tunesmith.data.engines.engine import Running
from tunesmith.data.shelf import Places, Rows

T = TypeVar("T")
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
        template = common([text_of(row, "prompt") for row in some(rows)])
        sketch = near.Sketch("prompt", WORDS, threshold, Path(name), template)
        leaders, _ = near.nearly_same(near.keys_of(rows, sketch, engine), threshold, Path(name), engine)
    several = np.flatnonzero(np.bincount(leaders, minlength=len(rows))[leaders] > 1)
    several = several[np.argsort(rows.places[several])]
    return Alike(rows.places[several], leaders[several])


def common(texts: Sequence[str], words: int = WORDS) -> np.ndarray:
    """Runs of `words` words that a tenth of the texts have, as hashes, rising: of few texts half of them, or fifty. Of
    many texts some are looked at, evenly spread."""
    texts = list(some(texts))
    found, counts = np.unique(np.concatenate([NONE, *shingles(texts, words)]), return_counts=True)
    return found[counts >= max(len(texts) / 10, min(50, len(texts) / 2), 10)]


def some(given: Sequence[T]) -> Iterator[T]:
    """Of many rows or texts two thousand, evenly spread, one by one."""
    for i in np.unique(np.linspace(0, len(given) - 1, min(len(given), LOOKED_AT)).astype(int)).tolist():
        yield given[i]


def own_words(texts: Sequence[str], template: np.ndarray, words: int) -> list[str]:
    """The words of each text (`normalised`) that are in none of the runs of `words` words in `template`."""
    if not len(template):
        return [normalised(text) for text in texts]
    flat, ends = runs_of(texts, words)
    shared = np.isin(flat, template)
    found = []
    for text, (begin, end) in zip(texts, pairwise([0, *ends.tolist()]), strict=True):
        its = np.flatnonzero(shared[begin:end])
        spoken = words_of(text)
        if len(its):
            own = np.ones(len(spoken), dtype=bool)
            own[np.minimum(its[:, None] + np.arange(words), len(spoken) - 1)] = False
            spoken = [word for word, is_own in zip(spoken, own.tolist(), strict=True) if is_own]
        found.append(" ".join(spoken))
    return found
