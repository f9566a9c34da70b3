"""What changed between two prepared sets: rows, and the shape of them."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from scipy import stats

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean import minhash
from tunesmith.data.clean.texts import text_of
from tunesmith.data.groups import DIGEST, digest, same
from tunesmith.data.prepare import PARTS, answers_kind
from tunesmith.data.shelf import Rows, Shelf, joined
from tunesmith.data.split import same_question
from tunesmith.runs import hash_json

EXAMPLES = 10
SIDES = ("prompt", "answer")
SHOWN = 200


@dataclass(frozen=True)
class Side:
    """One of two sets: its rows, and a few bytes of each.

    Attributes:
        part: the number of each row's part.
        contents, questions, ids: digests (`groups.DIGEST`) of what each row holds, asks and is called.
        lengths: of prompt and answer in characters, shape [rows, 2].
    """

    rows: Rows
    part: np.ndarray
    contents: np.ndarray
    questions: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray


def diff(old: Path, new: Path) -> dict[str, Any]:
    """For each part and over all: rows added, removed, changed and moved between parts; shifts in length and labels.

    A row is the same where its content is, wherever it stood in its file. Of the others, one that asks the same
    question or stands in the same place (`file:row`) and shares half of its words is changed. Rows are read as they are
    looked at; of each, less than a hundred bytes are kept.
    """
    with TemporaryDirectory() as name:
        shelf = Shelf(Path(name))
        before, after = (_side(folder, shelf) for folder in (old, new))
        kept = matched(before.contents, after.contents)
        in_part = matched(*(_with_part(side) for side in (before, after)))
        changed, left = _changed(before, after, kept)
        removed, added = left
        return {
            "rows": {"old": len(before.rows), "new": len(after.rows)},
            "same": len(kept[0]),
            "other part": len(kept[0]) - len(in_part[0]),
            "added": _told(after, added),
            "removed": _told(before, removed),
            "changed": {
                "rows": len(changed[0]),
                "such as": [
                    _pair(a, b)
                    for a, b in zip(before.rows[changed[0][:EXAMPLES]], after.rows[changed[1][:EXAMPLES]], strict=True)
                ],
            },
            "lengths": {
                side: shift(before.lengths[:, column], after.lengths[:, column]) for column, side in enumerate(SIDES)
            },
            "labels": labels(before.rows, after.rows),
        }


def _side(folder: Path, shelf: Shelf) -> Side:
    parts = [shelf.take(folder / f"{part}.jsonl") for part in PARTS]
    rows = joined(parts, shelf)
    keys, lengths = [bytearray() for _ in range(3)], array("q")
    for row in rows:
        for told, key in zip(keys, (_content(row), same_question(row), row.id), strict=True):
            told += digest(key)
        lengths.extend(len(text_of(row, side)) for side in SIDES)
    part = np.repeat(np.arange(len(parts)), [len(some) for some in parts])
    contents, questions, ids = (np.frombuffer(told, dtype=DIGEST) for told in keys)
    return Side(rows, part, contents, questions, ids, np.array(lengths, dtype=np.int64).reshape(-1, 2))


def _content(row: Conversation) -> str:
    return hash_json({k: v for k, v in row.as_dict().items() if k not in ("id", "metadata")})


def _with_part(side: Side) -> np.ndarray:
    """Contents' digests, another for each part."""
    told = side.contents.copy()
    told["low"] ^= side.part.astype(np.uint64)
    return told


Numbers = tuple[np.ndarray, np.ndarray]  # of rows: the old set's, the new one's


def matched(old: np.ndarray, new: np.ndarray) -> Numbers:
    """Numbers of rows of two sides that have the same digest: the first of one with the first of the other, and so on,
    each once; in the old side's order."""
    key = same(np.concatenate([old, new]))
    first, second = (_counted(some, len(key)) for some in (key[: len(old)], key[len(old) :]))
    _, one, other = np.intersect1d(first, second, assume_unique=True, return_indices=True)
    order = np.argsort(one)
    return one[order], other[order]


def _counted(keys: np.ndarray, most: int) -> np.ndarray:
    """Numbers that tell the first of equal keys, the second, and so on apart."""
    order = np.argsort(keys, kind="stable")
    ordered, count = keys[order], np.arange(len(keys))
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(keys)]
    told = np.empty(len(keys), dtype=np.int64)
    told[order] = ordered * most + count - np.maximum.accumulate(np.where(starts, count, 0))
    return told


def _changed(before: Side, after: Side, kept: Numbers) -> tuple[Numbers, Numbers]:
    """Rows that were changed, in pairs; and those that are in one set alone."""
    sides = (before, after)
    left = tuple(np.setdiff1d(np.arange(len(s.rows)), gone) for s, gone in zip(sides, kept, strict=True))
    found: list[list[np.ndarray]] = [[], []]
    for by in ("questions", "ids"):
        pairs = matched(*(getattr(side, by)[some] for side, some in zip(sides, left, strict=True)))
        pairs = (left[0][pairs[0]], left[1][pairs[1]])
        if by == "ids":
            both = zip(before.rows[pairs[0]], after.rows[pairs[1]], strict=True)
            near = np.fromiter((_alike(a, b) for a, b in both), dtype=bool, count=len(pairs[0]))
            pairs = (pairs[0][near], pairs[1][near])
        left = tuple(np.setdiff1d(some, gone) for some, gone in zip(left, pairs, strict=True))
        for told, numbers in zip(found, pairs, strict=True):
            told.append(numbers)
    return (np.concatenate(found[0]), np.concatenate(found[1])), (left[0], left[1])


def _alike(one: Conversation, other: Conversation) -> bool:
    """Whether two rows share half of their words: places shift where a file's rows do."""
    first, second = minhash.shingles([text_of(row, "both") for row in (one, other)], words=1)
    return minhash.alike(first, second, 0.5)


def shift(old: np.ndarray, new: np.ndarray) -> dict[str, float]:
    """Means of both, and whether the two samples may come from one distribution (Kolmogorov-Smirnov)."""
    if not len(old) or not len(new):
        return {}
    test = stats.ks_2samp(old, new)
    return {
        "old mean": float(np.mean(old)),
        "new mean": float(np.mean(new)),
        "distance": float(test.statistic),
        "p": float(test.pvalue),
    }


def labels(old: Rows, new: Rows) -> dict[str, dict[str, float]]:
    """Each label's share in both, where the answers are labels; the largest shift first."""
    if not old or not new or answers_kind(old + new) != "label":
        return {}
    counts = [Counter(row.answer for row in rows) for rows in (old, new)]
    shares = {
        label: {"old": counts[0][label] / len(old), "new": counts[1][label] / len(new)}
        for label in sorted(counts[0] | counts[1])
    }
    return dict(sorted(shares.items(), key=lambda s: -abs(s[1]["new"] - s[1]["old"])))


def _told(side: Side, which: np.ndarray) -> dict[str, Any]:
    counts = np.bincount(side.part[which], minlength=len(PARTS)).tolist()
    first = which[:EXAMPLES]
    return {
        "rows": len(which),
        "by part": {part: count for part, count in zip(PARTS, counts, strict=True) if count},
        "such as": [
            {"row": row.id, "part": PARTS[part], "text": text_of(row, "both")[:SHOWN]}
            for row, part in zip(side.rows[first], side.part[first].tolist(), strict=True)
        ],
    }


def _pair(old: Conversation, new: Conversation) -> Mapping[str, str]:
    return {"row": new.id, "old": text_of(old, "both")[:SHOWN], "new": text_of(new, "both")[:SHOWN]}
