"""Crowds: more rows share a band than can be compared with one another, as rows of one template do. They get keys of
their rarest runs of words, which no two rows have in common for the template's sake.

Two sets with a Jaccard similarity of t or more, the larger one of a runs and the smaller of b, share at least ta and at
least 2tb / (1 + t) runs. So, whatever the order of all runs, some run is among the larger one's first a - ceil(ta) + 1
and among the smaller one's first b - ceil(2tb / (1 + t)) + 1 (prefix filter: Chaudhuri et al. 2006; Xiao et al. 2008,
PPJoin). With rare runs first, what all rows share is among them only for rows that have little else: those are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

AT_ONCE = 2**20  # runs that are looked at together


@dataclass(frozen=True)
class Some:
    """Rows of a crowd, from one file of runs: their numbers, and where in the file each one's runs start and end."""

    runs: Path
    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclass(frozen=True)
class Rarest:
    """Writes keys of some rows to a Parquet file of `row` and `key`. `row` is twice the row's number; one more where it
    may be the smaller of two that share the key.

    Attributes:
        sample: runs of some rows of the crowd, rising: how often a run is there tells how rare it is.
    """

    threshold: float
    sample: np.ndarray

    def __call__(self, some: Some) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        held = np.memmap(some.runs, dtype=np.uint64, mode="r")
        found = []
        for part in stretches(some.ends - some.starts, AT_ONCE):
            flat, counts = taken(held, some.starts[part], some.ends[part])
            found.append(self._keys(some.rows[part], flat, counts))
        row, key = (np.concatenate(columns) for columns in zip(*found, strict=True))
        path = some.runs.with_name(f"rarest-{some.runs.name}.parquet")
        pq.write_table(
            pa.table({"row": row, "key": key.view(np.int64)}), path, compression="none", use_dictionary=False
        )
        return path

    def _keys(self, rows: np.ndarray, flat: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        which = np.repeat(np.arange(len(rows)), counts)
        flat = flat[np.lexsort((flat, which))]
        once = np.concatenate([[True], (flat[1:] != flat[:-1]) | (which[1:] != which[:-1])])
        flat, which = flat[once], which[once]
        often = np.searchsorted(self.sample, flat, "right") - np.searchsorted(self.sample, flat)
        flat = flat[np.lexsort((often, which))]
        sizes = np.bincount(which)
        place = np.arange(len(flat)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        larger, smaller = (
            (sizes - np.ceil(share * sizes - 1e-9) + 1)[which]
            for share in (self.threshold, 2 * self.threshold / (1 + self.threshold))
        )
        first = place < larger
        return 2 * rows[which[first]] + (place < smaller)[first], flat[first]


def taken(held: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an array holds from each start to its end, one after the other; and how many each has."""
    counts = ends - starts
    return held[np.arange(counts.sum()) + np.repeat(ends - np.cumsum(counts), counts)], counts


def stretches(sizes: np.ndarray, most: int) -> Iterator[slice]:
    """Stretches whose sizes come to `most` at most, or that are of one."""
    upto, start = np.cumsum(sizes, dtype=np.int64), 0
    while start < len(sizes):
        before = int(upto[start - 1]) if start else 0
        end = max(int(np.searchsorted(upto, before + most, "right")), start + 1)
        yield slice(start, end)
        start = end
