"""Rows that belong together, by number: a few bytes of each."""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


def digest(value: str | np.ndarray) -> bytes:
    """Sixteen bytes for a text or an array: no two different ones are likely to be seen with the same."""
    content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value.tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def same(digests: np.ndarray) -> np.ndarray:
    """For each row the first that says the same, int64; one whose digest is zero is alone."""
    order = np.lexsort((np.arange(len(digests)), digests["low"], digests["high"]))
    ordered = digests[order]
    starts = np.ones(len(order), dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    leaders = np.empty(len(order), dtype=np.int64)
    leaders[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    alone = (digests["high"] == 0) & (digests["low"] == 0)
    leaders[alone] = np.flatnonzero(alone)
    return leaders


def equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of keys that are there twice and more, those of equal keys together and rising; and how many each has."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts, ends = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(order)]])
    sizes = (ends - starts)[ends - starts > 1] if len(order) else np.empty(0, dtype=np.int64)
    return order[np.repeat(ends - starts > 1, ends - starts)], sizes


class Groups:
    """Things joined into groups, each led by the first of its members."""

    def __init__(self, size: int) -> None:
        self._parent = array("q", range(size))

    def leader(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(self, i: int, j: int) -> None:
        first, second = sorted((self.leader(i), self.leader(j)))
        self._parent[second] = first

    def leaders(self) -> np.ndarray:
        """The first member of each one's group, int64."""
        found = np.array(self._parent, dtype=np.int64)
        while (found != found[found]).any():
            found = found[found]
        return found
