"""Near-duplicates: word shingles, MinHash bands as keys, true Jaccard similarity to decide.

A text becomes the set of its runs of `words` words, hashed to 64 bits. MinHash signatures (Broder 1997), cut into
bands, give keys: texts that share none are not compared. Those that share one are compared by the true Jaccard
similarity of their sets, so a chance key costs time and never a row. Who brings together what shares a key: near.py.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np

PERMUTATIONS = 128
MISSED_AT_MOST = 1e-4
CHUNK = 1024  # texts whose runs lie in a processor's own cache
LONG_WORD = 64  # bytes
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
NOT_WORDS = re.compile(r"[\W_]+")
SPACE = ord(" ")
ASCII = bytes(ord(c.lower()) if c.isalnum() else SPACE for c in map(chr, range(128))) + bytes(range(128, 256))
# Scripts written without spaces: each character counts as a word.
UNSPACED = re.compile(r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\u0e00-\u0e7f\uf900-\ufaff])")
FIRST_BYTES = np.array([2 ** (8 * n) - 1 for n in range(9)], dtype=np.uint64)

Shingles = np.ndarray  # uint64, sorted, each once


def words_of(text: str) -> list[str]:
    """The text's words in lower case."""
    if text.isascii():  # the same without a regular expression: most texts, many times as fast
        return text.encode().translate(ASCII).decode().split()
    return UNSPACED.sub(r" \1 ", NOT_WORDS.sub(" ", text.casefold())).split()


def normalised(text: str) -> str:
    """The text's words alone, in lower case: what two texts must share to be exact duplicates."""
    return " ".join(words_of(text))


NONE = np.empty(0, dtype=np.uint64)


def shingles(texts: Sequence[str], words: int = 3, template: np.ndarray = NONE) -> list[Shingles]:
    """For each text, hashes of its runs of `words` words (of the whole text where it has fewer), sorted; none of those
    in `template`.

    A text without words has none.
    """
    flat, ends = without(*runs_of(texts, words), template)
    return [distinct(runs) for runs in np.split(flat, ends[:-1])] if len(ends) else []


def without(flat: np.ndarray, ends: np.ndarray, template: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs as `runs_of` gives them, without those in `template`."""
    if not len(template):
        return flat, ends
    kept = ~np.isin(flat, template)
    return flat[kept], np.concatenate([[0], np.cumsum(kept)])[ends]


def distinct(runs: np.ndarray) -> Shingles:
    """Hashes of runs as a set: sorted, each once."""
    runs = np.sort(runs)
    once = np.ones(len(runs), dtype=bool)
    np.not_equal(runs[1:], runs[:-1], out=once[1:])
    return runs[once]


def runs_of(texts: Sequence[str], words: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """As `shingles`, but as they stand: (the hashes of all texts' runs, one after the other; where each text's end)."""
    found = [_runs(*_words(texts[i : i + CHUNK]), words) for i in range(0, len(texts), CHUNK)]
    return _all(found)


def hashes_of(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash for each word, as `runs_of` has them for runs: (the hashes, one text's after another's; where each
    text's end). Words of up to eight bytes never share one."""
    return _all([_words(texts[i : i + CHUNK]) for i in range(0, len(texts), CHUNK)])


def _all(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of (hashes, how many each text has) as one, with where each text's end."""
    flat = np.concatenate([NONE, *(hashes for hashes, _ in found)])
    return flat, np.cumsum(np.concatenate([np.empty(0, dtype=np.int64), *(counts for _, counts in found)]))


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of texts' words (`words_of`), and how many each text has; all texts' bytes at once."""
    spelled = [(t if t.isascii() else " ".join(words_of(t))).encode("utf-8", "surrogatepass") for t in texts]
    joined = b" ".join([b"", *spelled, bytes(7)]).translate(ASCII)  # a word's eight bytes may reach beyond the last
    is_word = np.frombuffer(joined, dtype=np.uint8) != SPACE
    edges = np.flatnonzero(is_word[1:] != is_word[:-1]) + 1
    starts, ends = edges[0::2], edges[1::2]
    sizes = ends - starts
    lanes = np.ndarray(len(joined) - 7, dtype="<u8", buffer=joined, strides=(1,))  # eight bytes from any place on
    hashes = stirred(lanes[starts] & FIRST_BYTES[np.minimum(sizes, 8)])
    for at in range(8, LONG_WORD, 8):
        longer = np.flatnonzero(sizes > at)
        if not len(longer):
            break
        lane = lanes[starts[longer] + at] & FIRST_BYTES[np.minimum(sizes[longer] - at, 8)]
        hashes[longer] = stirred(hashes[longer] * MIX[0] + lane)
    for i in np.flatnonzero(sizes > LONG_WORD).tolist():
        word = hashlib.blake2b(joined[starts[i] : ends[i]], digest_size=8).digest()
        hashes[i] = int.from_bytes(word, "little")
    upto = np.cumsum([1 + len(one) for one in spelled])
    return hashes, np.diff(np.searchsorted(starts, upto), prepend=0)


def stirred(numbers: np.ndarray) -> np.ndarray:
    """Each number as another that tells nothing of it, no two as the same one (murmur3's last step)."""
    numbers = (numbers ^ (numbers >> np.uint64(33))) * MIX[1]
    numbers = (numbers ^ (numbers >> np.uint64(29))) * MIX[2]
    return numbers ^ (numbers >> np.uint64(32))


def _runs(hashes: np.ndarray, lengths: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the runs of texts' words, and how many each text has."""
    starts = np.cumsum(lengths) - lengths
    counts = np.where(lengths >= words, lengths - words + 1, np.minimum(lengths, 1))
    begins = np.cumsum(counts) - counts
    whole = lengths >= words  # the others are one run, told apart from those of other lengths
    inside = np.arange(counts.sum()) + np.repeat(starts - begins, counts)
    possible = max(len(hashes) - words + 1, 0)
    mixed = _mixed([hashes[i : i + possible] for i in range(words)])
    runs = mixed[np.minimum(inside, max(len(mixed) - 1, 0))] if len(mixed) else np.empty(len(inside), dtype=np.uint64)
    for length in np.unique(lengths[~whole & (lengths > 0)]).tolist():
        short = lengths == length
        runs[begins[short]] = _mixed([hashes[starts[short] + i] for i in range(length)])
    return runs, counts


def _mixed(columns: Sequence[np.ndarray]) -> np.ndarray:
    """One hash for each row of columns of hashes, by a polynomial whose middle bits are stirred."""
    total = np.zeros(len(columns[0]), dtype=np.uint64)
    for column in columns:
        total = total * MIX[0] + column
        total ^= total >> np.uint64(29)
    return total * MIX[1] + np.uint64(len(columns))


MULTIPLIERS = (stirred(np.arange(1, PERMUTATIONS + 1, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(
    1
)


def band_shape(threshold: float) -> tuple[int, int]:
    """(bands, rows in each): the widest bands that miss a pair at the threshold less than once in 10,000."""
    for rows in range(PERMUTATIONS, 0, -1):
        bands = PERMUTATIONS // rows
        if (1 - threshold**rows) ** bands <= MISSED_AT_MOST:
            return bands, rows
    return PERMUTATIONS, 1


def band_keys(flat: np.ndarray, ends: np.ndarray, threshold: float) -> np.ndarray:
    """Keys of sets of runs, shape (sets, bands): two sets that share one in the same column may be alike. Sets without
    runs have zeros.

    Args:
        flat, ends: as `runs_of` gives them.
    """
    bands, rows = band_shape(threshold)
    keys = np.zeros((bands, len(ends)), dtype=np.uint64)
    starts = np.concatenate([[0], ends[:-1]])
    some = np.flatnonzero(ends > starts)
    for block in range(0, len(some), CHUNK):
        sets = some[block : block + CHUNK]
        begin, end = starts[sets[0]], ends[sets[-1]]
        runs = (flat[begin:end] >> np.uint64(32)).astype(np.uint32)
        permuted, first = np.empty_like(runs), starts[sets] - begin
        for band, multipliers in enumerate(MULTIPLIERS[: bands * rows].reshape(bands, rows)):
            key = np.zeros(len(sets), dtype=np.uint64)
            for multiplier in multipliers:  # times an odd number is a permutation of all 32-bit numbers
                np.multiply(runs, multiplier, out=permuted)
                key = key * MIX[0] + np.minimum.reduceat(permuted, first)
                key ^= key >> np.uint64(31)
            keys[band, sets] = key
    return keys.T


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
    flat = np.concatenate([NONE, *sets])
    return band_keys(flat, np.cumsum([len(s) for s in sets], dtype=np.int64), threshold)


class Index:
    """Sets, to be asked which of them is like another: the first that is."""

    def __init__(self, sets: Sequence[Shingles], threshold: float) -> None:
        self._threshold = threshold
        self._flat, self._ends = np.concatenate([NONE, *sets]), np.cumsum([0, *map(len, sets)])  # few arrays go far
        columns = band_keys(self._flat, self._ends[1:], threshold).T
        self._orders = [np.argsort(column, kind="stable") for column in columns]
        self._keys = [column[order] for column, order in zip(columns, self._orders, strict=True)]

    def like(self, sets: Sequence[Shingles]) -> dict[int, int]:
        """For each of `sets` that is like one of ours, the first such: {its number: the number of ours}."""
        found: dict[int, int] = {}
        if len(self._ends) < 2 or not len(sets):
            return found
        for keys, ordered, order in zip(_keys(sets, self._threshold).T, self._keys, self._orders, strict=True):
            starts, ends = np.searchsorted(ordered, keys, "left"), np.searchsorted(ordered, keys, "right")
            for i in np.flatnonzero(ends > starts).tolist():
                for j in order[starts[i] : ends[i]].tolist():  # rising
                    if j >= found.get(i, math.inf):
                        break
                    if alike(sets[i], self._flat[self._ends[j] : self._ends[j + 1]], self._threshold):
                        found[i] = j
        return found
