"""Rows that belong together, by number: a few bytes of each."""

from __future__ import annotations

import hashlib

import numpy as np

DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


def digest(value: str | np.ndarray) -> bytes:
    """Sixteen bytes for a text or an array: no two different ones are likely to be seen with the same."""
    content = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value.tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def same(digests: np.ndarray) -> np.ndarray:
    """For each row the first that says the same, int64; one whose digest is zero is alone."""
    order = np.lexsort((digests["low"], digests["high"]))  # which leaves rows of the same digest in their order
    starts = np.zeros(len(order), dtype=bool)
    starts[:1] = True
    for name in ("high", "low"):
        ordered = digests[name][order]
        starts[1:] |= ordered[1:] != ordered[:-1]
    leaders = np.empty(len(order), dtype=np.int64)
    leaders[order] = np.repeat(order[starts], np.diff(np.flatnonzero(np.append(starts, True))))
    alone = (digests["high"] == 0) & (digests["low"] == 0)
    leaders[alone] = np.flatnonzero(alone)
    return leaders


def equal(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of keys that are there twice and more, those of equal keys together and rising; and how many each has."""
    order = np.argsort(keys)
    again = np.concatenate([[False], keys[order[1:]] == keys[order[:-1]]])[: len(keys)]
    several = again | np.concatenate([again[1:], [False]])[: len(keys)]
    group = np.cumsum(~again[several]) - 1
    places = order[several]
    return places[np.lexsort((places, group))], np.bincount(group)


class Groups:
    """Things joined into groups, each led by the first of its members."""

    def __init__(self, size: int, leaders: np.ndarray | None = None) -> None:
        """`leaders` is what is joined already, as `leaders()` gives it."""
        self._parents = np.arange(size, dtype=np.int64) if leaders is None else leaders.astype(np.int64)
        self._parent = self._parents.data  # the same numbers, quicker to be had one by one

    def leader(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(self, i: int, j: int) -> None:
        first, second = sorted((self.leader(i), self.leader(j)))
        self._parent[second] = first

    def of(self, members: np.ndarray) -> np.ndarray:
        """The first member of the group of each of these, int64."""
        found = self._parents[members]
        while ((further := self._parents[found]) != found).any():
            found = further
        return found

    def leaders(self) -> np.ndarray:
        """The first member of each one's group, int64."""
        return self.of(np.arange(len(self._parents)))
