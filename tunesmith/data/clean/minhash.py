"""Near-duplicates: word shingles, MinHash bands as keys, true Jaccard similarity to decide.

A text becomes the set of its runs of `words` words, hashed to 64 bits. MinHash signatures (Broder 1997), cut into
bands, give keys: texts that share none are not compared. Those that share one are compared by the true Jaccard
similarity of their sets, so a chance key costs time and never a row. All but `joined` is a function of one text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

PERMUTATIONS = 128
MISSED_AT_MOST = 1e-4
CHUNK = 4096
SEED = 20_250_601
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
NOT_WORDS = re.compile(r"[\W_]+")
NOT_ASCII_WORDS = {code: " " for code in range(128) if not chr(code).isalnum()}
# Scripts written without spaces: each character counts as a word.
UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f\uf900-\ufaff])")

Shingles = np.ndarray  # uint64, sorted, each once


def normalised(text: str) -> str:
    """The text's words alone, in lower case: what two texts must share to be exact duplicates."""
    if text.isascii():  # the same without a regular expression: most texts, many times as fast
        return " ".join(text.lower().translate(NOT_ASCII_WORDS).split())
    folded = NOT_WORDS.sub(" ", text.casefold())
    return " ".join(UNSPACED.sub(r" \1 ", folded).split())


def shingles(texts: Sequence[str], words: int = 3) -> list[Shingles]:
    """For each text, hashes of its runs of `words` words (of the whole text where it has fewer), sorted.

    A text without words has none.
    """
    found: list[Shingles] = []
    for start in range(0, len(texts), CHUNK):
        found += _chunk([normalised(text).split() for text in texts[start : start + CHUNK]], words)
    return found


def _chunk(tokens: list[list[str]], words: int) -> list[Shingles]:
    import rensa

    hashed = rensa.RMinHash.hash_token_sets(tokens)
    lengths = np.array([len(t) for t in hashed], dtype=np.int64)
    flat = np.fromiter(chain.from_iterable(hashed), dtype=np.uint64, count=int(lengths.sum()))
    ends = np.cumsum(lengths)
    with np.errstate(over="ignore"):
        mixed = _mixed(flat, words)
        found = []
        for end, length in zip(ends, lengths, strict=True):
            begin = end - length
            if length >= words:
                runs = mixed[begin : end - words + 1]
            else:  # a short text is one run, told apart from other lengths
                runs = _mixed(flat[begin:end], int(length))[:1] if length else flat[:0]
            found.append(np.unique(runs))
    return found


def _mixed(hashes: np.ndarray, words: int) -> np.ndarray:
    """One hash for each run of `words` hashes, by a polynomial whose middle bits are stirred."""
    total = np.zeros(max(len(hashes) - words + 1, 0), dtype=np.uint64)
    for i in range(words):
        total = total * MIX[0] + hashes[i : i + len(total)]
        total ^= total >> np.uint64(29)
    return total * MIX[1] + np.uint64(words)


def band_shape(threshold: float) -> tuple[int, int]:
    """(bands, rows in each): the widest bands that miss a pair at the threshold less than once in 10,000."""
    for rows in range(PERMUTATIONS, 0, -1):
        bands = PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= MISSED_AT_MOST:
            return bands, rows
    return PERMUTATIONS, 1


def band_keys(sets: Sequence[Shingles], threshold: float) -> np.ndarray:
    """Keys of each set, shape (sets, bands): two sets that share one in the same column may be alike."""
    import rensa

    bands, rows = band_shape(threshold)
    out = np.empty((len(sets), bands), dtype=np.uint64)
    for start in range(0, len(sets), CHUNK):
        part = sets[start : start + CHUNK]
        flat = np.concatenate(part) if part else np.empty(0, dtype=np.uint64)
        offsets = np.concatenate([[0], np.cumsum([len(s) for s in part])]).astype(np.uint64)
        digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, bands * rows, SEED)
        signatures = np.array(digests.to_rows(), dtype=np.uint64).reshape(len(part), bands, rows)
        key = np.zeros((len(part), bands), dtype=np.uint64)
        with np.errstate(over="ignore"):
            for i in range(rows):
                key = key * MIX[0] + signatures[:, :, i]
                key ^= key >> np.uint64(31)
        out[start : start + len(part)] = key
    return out


def jaccard(one: Shingles, other: Shingles) -> float:
    """Shared runs over all runs of two sets; 0 where one is empty."""
    if not len(one) or not len(other):
        return 0.0
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def alike(one: Shingles, other: Shingles, threshold: float) -> bool:
    """Whether two sets' Jaccard similarity reaches the threshold."""
    few, many = sorted((len(one), len(other)))
    return few >= threshold * many and jaccard(one, other) >= threshold - 1e-12


class Groups:
    """Things joined into groups, each led by the first of its members."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def leader(self, i: int) -> int:
        parent = self._parent
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(self, i: int, j: int) -> None:
        first, second = sorted((self.leader(i), self.leader(j)))
        self._parent[second] = first

    def members(self) -> list[list[int]]:
        """Groups of two and more, in the order of their leaders."""
        found: dict[int, list[int]] = {}
        for i in range(len(self._parent)):
            found.setdefault(self.leader(i), []).append(i)
        return [group for group in found.values() if len(group) > 1]


def shared_keys(keys: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
    """Indices of sets that share a key, a group at a time, for each column of keys."""
    for column in keys:
        order = np.argsort(column, kind="stable")
        ordered = column[order]
        cuts = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        starts, ends = np.concatenate([[0], cuts]), np.concatenate([cuts, [len(order)]])
        for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
            yield order[start:end]


def joined(sets: Sequence[Shingles], threshold: float) -> Groups:
    """Sets joined where they are alike, directly or through others. Sets without a shingle stay alone."""
    groups = Groups(len(sets))
    distinct: dict[bytes, int] = {}
    for i, one in enumerate(sets):  # equal sets need no comparison, however many there are
        if len(one):
            groups.join(i, distinct.setdefault(one.tobytes(), i))
    kept = sorted(distinct.values())
    for bucket in shared_keys(band_keys([sets[i] for i in kept], threshold).T):
        members = [kept[i] for i in bucket]
        for place, i in enumerate(members):
            for j in members[place + 1 :]:
                if groups.leader(i) != groups.leader(j) and alike(sets[i], sets[j], threshold):
                    groups.join(i, j)
    return groups


def near_pairs(rows: Sequence[Shingles], others: Sequence[Shingles], threshold: float) -> dict[int, int]:
    """For each row that is like one of `others`, the first such: {index of row: index of other}."""
    both = [*rows, *others]
    found: dict[int, int] = {}
    if not len(rows) or not len(others):
        return found
    for bucket in shared_keys(band_keys(both, threshold).T):
        ours, theirs = bucket[bucket < len(rows)], bucket[bucket >= len(rows)]
        for i in ours.tolist():
            for j in theirs.tolist():
                other = j - len(rows)
                if other < found.get(i, math.inf) and alike(both[i], both[j], threshold):
                    found[i] = other
    return found
