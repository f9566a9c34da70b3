"""What changed between two prepared sets: rows, and the shape of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean import minhash
from tunesmith.data.clean.texts import text_of
from tunesmith.data.prepare import PARTS, load_rows
from tunesmith.data.split import same_question
from tunesmith.runs import hash_json

EXAMPLES = 10
SHOWN = 200


def diff(old: Path, new: Path) -> dict[str, Any]:
    """For each part and over all: rows added, removed, changed and moved between parts; shifts in length and labels.

    A row is the same where its content is, wherever it stood in its file. Of the others, one that asks the same
    question or stands in the same place (`file:row`) and shares half of its words is changed.
    """
    sides = [{part: load_rows(folder / f"{part}.jsonl") for part in PARTS} for folder in (old, new)]
    before, after = ([(part, row) for part, rows in side.items() for row in rows] for side in sides)
    places: list[dict[str, list[tuple[str, Conversation]]]] = [{}, {}]
    for found, rows in zip(places, (before, after), strict=True):
        for part, row in rows:
            found.setdefault(_content(row), []).append((part, row))
    moved: dict[str, list[tuple[str, Conversation]]] = {"old": [], "new": []}
    same = changed_part = 0
    for content in dict.fromkeys([*places[0], *places[1]]):
        one, other = places[0].get(content, []), places[1].get(content, [])
        both = min(len(one), len(other))
        same += both
        changed_part += both - sum((Counter(p for p, _ in one) & Counter(p for p, _ in other)).values())
        moved["old"] += one[both:]
        moved["new"] += other[both:]
    changed = _paired(moved["old"], moved["new"])
    gone = {id(row) for row, _ in changed}, {id(row) for _, row in changed}
    removed = [(part, row) for part, row in moved["old"] if id(row) not in gone[0]]
    added = [(part, row) for part, row in moved["new"] if id(row) not in gone[1]]
    return {
        "rows": {"old": len(before), "new": len(after)},
        "same": same,
        "other part": changed_part,
        "added": _told(added),
        "removed": _told(removed),
        "changed": {"rows": len(changed), "such as": [_pair(a, b) for a, b in changed[:EXAMPLES]]},
        "lengths": {
            side: shift([len(text_of(r, side)) for _, r in before], [len(text_of(r, side)) for _, r in after])
            for side in ("prompt", "answer")
        },
        "labels": labels([row for _, row in before], [row for _, row in after]),
    }


def _content(row: Conversation) -> str:
    return hash_json({k: v for k, v in row.as_dict().items() if k not in ("id", "metadata")})


def _paired(
    old: Sequence[tuple[str, Conversation]], new: Sequence[tuple[str, Conversation]]
) -> list[tuple[Conversation, Conversation]]:
    found: list[tuple[Conversation, Conversation]] = []
    left = {id(row): row for _, row in new}
    asked: dict[str, list[Conversation]] = {}
    for row in left.values():
        asked.setdefault(same_question(row), []).append(row)
    unpaired = []
    for _, row in old:
        others = asked.get(same_question(row))
        if others:
            found.append((row, left.pop(id(others.pop(0)))))
        else:
            unpaired.append(row)
    at = {row.id: row for row in left.values()}
    for row in unpaired:
        other = at.get(row.id)
        if other is not None and _alike(row, other):
            found.append((row, other))
    return found


def _alike(one: Conversation, other: Conversation) -> bool:
    """Whether two rows share half of their words: places shift where a file's rows do."""
    first, second = minhash.shingles([text_of(row, "both") for row in (one, other)], words=1)
    return minhash.alike(first, second, 0.5)


def shift(old: Sequence[float], new: Sequence[float]) -> dict[str, float]:
    """Means of both, and whether the two samples may come from one distribution (Kolmogorov-Smirnov)."""
    if not old or not new:
        return {}
    test = stats.ks_2samp(old, new)
    return {
        "old mean": sum(old) / len(old),
        "new mean": sum(new) / len(new),
        "distance": float(test.statistic),
        "p": float(test.pvalue),
    }


def labels(old: Sequence[Conversation], new: Sequence[Conversation]) -> dict[str, dict[str, float]]:
    """Each label's share in both, where the answers are labels; the largest shift first."""
    from tunesmith.data.prepare import answers_kind

    if not old or not new or answers_kind([*old, *new]) != "label":
        return {}
    counts = [Counter(row.answer for row in rows) for rows in (old, new)]
    shares = {
        label: {"old": counts[0][label] / len(old), "new": counts[1][label] / len(new)}
        for label in sorted(counts[0] | counts[1])
    }
    return dict(sorted(shares.items(), key=lambda s: -abs(s[1]["new"] - s[1]["old"])))


def _told(rows: Sequence[tuple[str, Conversation]]) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "by part": dict(Counter(part for part, _ in rows)),
        "such as": [
            {"row": row.id, "part": part, "text": text_of(row, "both")[:SHOWN]} for part, row in rows[:EXAMPLES]
        ],
    }


def _pair(old: Conversation, new: Conversation) -> Mapping[str, str]:
    return {"row": new.id, "old": text_of(old, "both")[:SHOWN], "new": text_of(new, "both")[:SHOWN]}
