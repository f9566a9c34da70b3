"""Which rows ask nearly the same, exactly: every pair at or above a Jaccard similarity of word runs.

Only rows that share one of their rarest runs are compared: two sets of a similarity of t or more must share a run among
the first |x| - ceil(t |x|) + 1 of each, whatever order all runs are put in (prefix filter; Bayardo et al. 2007).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from tunesmith.conversation.message import Conversation
from tunesmith.data.augment.base import runs
from tunesmith.data.clean.texts import media_of


def pairs_alike(rows: Sequence[Conversation], threshold: float) -> list[list[int]]:
    """The places of rows whose questions are alike, in pairs."""
    # rows with other images or sounds share no run
    sets = [frozenset(run + media_of(row) for run in runs(row.question)) for row in rows]
    common = Counter(run for found in sets for run in found)
    where: dict[str, list[int]] = {}
    pairs = []
    for i, found in enumerate(sets):
        rare = sorted(found, key=lambda run: (common[run], run))
        prefix = rare[: len(rare) - math.ceil(threshold * len(rare) - 1e-9) + 1]
        for j in sorted({j for run in prefix for j in where.get(run, ())}):
            both = len(found & sets[j])
            if both >= threshold * (len(found) + len(sets[j]) - both):
                pairs.append([j, i])
        for run in prefix:
            where.setdefault(run, []).append(i)
    return pairs
