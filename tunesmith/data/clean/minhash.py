"""Near-duplicates: word shingles, MinHash bands as keys, true Jaccard similarity to decide.

A text becomes the set of its runs of `words` words, hashed to 64 bits. MinHash signatures (Broder 1997), cut into
bands, give keys: texts that share none are not compared. Those that share one are compared by the true Jaccard
similarity of their sets, so a chance key costs time and never a row. Who brings together what shares a key: near.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain

import numpy as np

PERMUTATIONS = 128
MISSED_AT_MOST = 1e-4
CHUNK = 4096
WORDS_KEPT = 500_000
SEED = 20_250_601
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
NOT_WORDS = re.compile(r"[\W_]+")
ASCII = bytes(ord(c.lower()) if c.isalnum() else ord(" ") for c in map(chr, range(128))) + bytes(128)
# Scripts written without spaces: each character counts as a word.
UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f\uf900-\ufaff])")

Shingles = np.ndarray  # uint64, sorted, each once


def words_of(text: str) -> list[str]:
    """The text's words in lower case."""
    if text.isascii():  # the same without a regular expression: most texts, many times as fast
        return text.encode().translate(ASCII).decode().split()
    return UNSPACED.sub(r" \1 ", NOT_WORDS.sub(" ", text.casefold())).split()


def normalised(text: str) -> str:
    """The text's words alone, in lower case: what two texts must share to be exact duplicates."""
    return " ".join(words_of(text))


def shingles(texts: Sequence[str], words: int = 3) -> list[Shingles]:
    """For each text, hashes of its runs of `words` words (of the whole text where it has fewer), sorted.

    A text without words has none.
    """
    flat, ends = runs_of(texts, words)
    return [distinct(runs) for runs in np.split(flat, ends[:-1])] if len(ends) else []


def distinct(runs: np.ndarray) -> Shingles:
    """Hashes of runs as a set: sorted, each once."""
    runs = np.sort(runs)
    once = np.ones(len(runs), dtype=bool)
    np.not_equal(runs[1:], runs[:-1], out=once[1:])
    return runs[once]


def runs_of(texts: Sequence[str], words: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """As `shingles`, but as they stand: (the hashes of all texts' runs, one after the other; where each text's end)."""
    found = [_runs([words_of(text) for text in texts[i : i + CHUNK]], words) for i in range(0, len(texts), CHUNK)]
    flat = np.concatenate([np.empty(0, dtype=np.uint64), *(runs for runs, _ in found)])
    return flat, np.cumsum(np.concatenate([np.empty(0, dtype=np.int64), *(counts for _, counts in found)]))


class _Hashes(dict[str, int]):
    """Words' hashes, each computed once for as long as there are not too many."""

    def __missing__(self, word: str) -> int:
        import rensa

        if len(self) >= WORDS_KEPT:
            self.clear()
        value = self[word] = int(rensa.RMinHash.hash_token_sets([[word]])[0][0])
        return value


_hashes = _Hashes()


def _runs(tokens: list[list[str]], words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the runs of texts' words, and how many each text has."""
    lengths = np.array([len(t) for t in tokens], dtype=np.int64)
    each = map(_hashes.__getitem__, chain.from_iterable(tokens))
    flat = np.fromiter(each, dtype=np.uint64, count=int(lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    counts = np.where(lengths >= words, lengths - words + 1, np.minimum(lengths, 1))
    begins = np.cumsum(counts) - counts
    where = np.repeat(starts - begins, counts) + np.arange(counts.sum())
    with np.errstate(over="ignore"):
        mixed = _mixed(flat, words)
        mixed = np.concatenate([mixed, np.zeros(len(flat) - len(mixed), dtype=np.uint64)])
        runs = mixed[where]
        for i in np.flatnonzero((lengths > 0) & (lengths < words)).tolist():
            # a short text is one run, told apart from other lengths
            begin, length = int(starts[i]), int(lengths[i])
            runs[begins[i]] = _mixed(flat[begin : begin + length], length)[0]
    return runs, counts


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


def band_keys(flat: np.ndarray, ends: np.ndarray, threshold: float) -> np.ndarray:
    """Keys of sets of runs, shape (sets, bands): two sets that share one in the same column may be alike.

    Args:
        flat, ends: as `runs_of` gives them.
    """
    import rensa

    bands, rows = band_shape(threshold)
    out = np.empty((len(ends), bands), dtype=np.uint64)
    offsets = np.concatenate([[0], ends])
    for start in range(0, len(ends), CHUNK):
        part = offsets[start : start + CHUNK + 1]
        count = len(part) - 1
        some, inner = flat[part[0] : part[-1]], (part - part[0]).astype(np.uint64)
        digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(some, inner, bands * rows, SEED)
        each = chain.from_iterable(digests.to_rows())
        signatures = np.fromiter(each, np.uint64, count * bands * rows).reshape(count, bands, rows)
        key = np.zeros((count, bands), dtype=np.uint64)
        with np.errstate(over="ignore"):
            for i in range(rows):
                key = key * MIX[0] + signatures[:, :, i]
                key ^= key >> np.uint64(31)
        out[start : start + count] = key
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


def _keys(sets: Sequence[Shingles], threshold: float) -> np.ndarray:
    flat = np.concatenate([np.empty(0, dtype=np.uint64), *sets])
    return band_keys(flat, np.cumsum([len(s) for s in sets], dtype=np.int64), threshold)


class Index:
    """Sets, to be asked which of them is like another: the first that is."""

    def __init__(self, sets: Sequence[Shingles], threshold: float) -> None:
        self._sets, self._threshold = sets, threshold
        columns = _keys(sets, threshold).T
        self._orders = [np.argsort(column, kind="stable") for column in columns]
        self._keys = [column[order] for column, order in zip(columns, self._orders, strict=True)]

    def like(self, sets: Sequence[Shingles]) -> dict[int, int]:
        """For each of `sets` that is like one of ours, the first such: {its number: the number of ours}."""
        found: dict[int, int] = {}
        if not len(self._sets) or not len(sets):
            return found
        for keys, ordered, order in zip(_keys(sets, self._threshold).T, self._keys, self._orders, strict=True):
            starts, ends = np.searchsorted(ordered, keys, "left"), np.searchsorted(ordered, keys, "right")
            for i in np.flatnonzero(ends > starts).tolist():
                for j in order[starts[i] : ends[i]].tolist():  # rising
                    if j >= found.get(i, math.inf):
                        break
                    if alike(sets[i], self._sets[j], self._threshold):
                        found[i] = j
        return found
