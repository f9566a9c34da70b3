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
ONE = np.ones(1, dtype=bool)
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


class _Hashes(dict[str, int]):
    """Words' hashes, each computed once for as long as there are not too many."""

    def __missing__(self, word: str) -> int:
        import rensa

        if len(self) >= WORDS_KEPT:
            self.clear()
        value = self[word] = int(rensa.RMinHash.hash_token_sets([[word]])[0][0])
        return value


_hashes = _Hashes()


def _chunk(tokens: list[list[str]], words: int) -> list[Shingles]:
    lengths = np.array([len(t) for t in tokens], dtype=np.int64)
    each = map(_hashes.__getitem__, chain.from_iterable(tokens))
    flat = np.fromiter(each, dtype=np.uint64, count=int(lengths.sum()))
    ends = np.cumsum(lengths)
    with np.errstate(over="ignore"):
        mixed = _mixed(flat, words)
        found = []
        for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
            begin = end - length
            if length >= words:
                runs = mixed[begin : end - words + 1]
            else:  # a short text is one run, told apart from other lengths
                runs = _mixed(flat[begin:end], length)[:1] if length else flat[:0]
            runs = np.sort(runs)
            found.append(runs if len(runs) < 2 else runs[np.concatenate([ONE, runs[1:] != runs[:-1]])])
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
        each = chain.from_iterable(digests.to_rows())
        signatures = np.fromiter(each, np.uint64, len(part) * bands * rows).reshape(len(part), bands, rows)
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


class Index:
    """Sets, to be asked which of them is like another: the first that is."""

    def __init__(self, sets: Sequence[Shingles], threshold: float) -> None:
        self._sets, self._threshold = sets, threshold
        columns = band_keys(sets, threshold).T
        self._orders = [np.argsort(column, kind="stable") for column in columns]
        self._keys = [column[order] for column, order in zip(columns, self._orders, strict=True)]

    def like(self, sets: Sequence[Shingles]) -> dict[int, int]:
        """For each of `sets` that is like one of ours, the first such: {its number: the number of ours}."""
        found: dict[int, int] = {}
        if not len(self._sets) or not len(sets):
            return found
        for keys, ordered, order in zip(band_keys(sets, self._threshold).T, self._keys, self._orders, strict=True):
            starts, ends = np.searchsorted(ordered, keys, "left"), np.searchsorted(ordered, keys, "right")
            for i in np.flatnonzero(ends > starts).tolist():
                for j in order[starts[i] : ends[i]].tolist():  # rising
                    if j >= found.get(i, math.inf):
                        break
                    if alike(sets[i], self._sets[j], self._threshold):
                        found[i] = j
        return found
