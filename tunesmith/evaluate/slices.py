"""Parts of the test rows, and how both models do on each: what an average hides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.conversation.message import Conversation, tags
from tunesmith.evaluate.metrics.base import Floats, Metric
from tunesmith.evaluate.statistics import compared

FEWEST, MOST_VALUES, RESAMPLES = 5, 200, 500
MANY_NUMBERS = 12  # different ones, above which a column of numbers is told apart by its thirds


def slices(
    rows: Sequence[Conversation], kind: str, metric: Metric, stats: dict[str, Floats], seed: int
) -> list[dict[str, Any]]:
    """The goal's score in each slice of at least five rows, worst difference first.

    Slices are by label, source, length of the prompt (thirds), and every column that rows keep as metadata: texts, yes
    and no, and numbers (by thirds, where they are many).
    """
    found = []
    for by, values in columns(rows, kind).items():
        places: dict[str, list[int]] = defaultdict(list)
        for i, value in enumerate(values):
            if value is not None:
                places[value].append(i)
        if not 1 < len(places) <= MOST_VALUES:
            continue
        for value, taken in places.items():
            if len(taken) >= FEWEST:
                part = {side: x[taken] for side, x in stats.items()}
                found.append({"by": by, "value": value} | compared(metric, part, RESAMPLES, seed))
    sign = 1 if metric.higher_is_better else -1

    def merit(part: dict[str, Any]) -> tuple[float, float]:
        return sign * part["difference"]["value"], sign * part["tuned"]["value"]

    return sorted((p for p in found if np.isfinite(merit(p)).all()), key=merit)


def by_task(
    rows: Sequence[Conversation], metrics: Sequence[Metric], stats: dict[str, dict[str, Floats]], seed: int
) -> dict[str, dict[str, Any]]:
    """Every metric on the rows of each tag alone, where there are two tags or more."""
    return {
        tag: {
            metric.name: compared(metric, {side: x[places] for side, x in stats[metric.name].items()}, RESAMPLES, seed)
            for metric in metrics
        }
        for tag, places in tags(rows).items()
    }


def columns(rows: Sequence[Conversation], kind: str) -> dict[str, list[str | None]]:
    """Each row's value of everything that rows can be told apart by."""
    found: dict[str, list[str | None]] = {"source": [row.id.rpartition(":")[0] or None for row in rows]}
    if kind == "label":
        found["label"] = [row.answer.strip() for row in rows]
    lengths: list[float | None] = [sum(len(m.content) for m in row.prompt) for row in rows]
    found["length"] = thirds(lengths, ("short (to {:.0f} characters)", "medium", "long (over {:.0f})"))
    for key in dict.fromkeys(key for row in rows for key in row.metadata):
        values = [row.metadata.get(key) for row in rows]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        if len(set(numbers)) > MANY_NUMBERS and len(numbers) == sum(v is not None for v in values):
            found[key] = thirds(values, ("to {:g}", "between", "over {:g}"))
        elif all(isinstance(v, str | int | float | bool | None) for v in values):
            found[key] = [None if v is None else str(v) for v in values]
    return found


def thirds(values: Sequence[float | None], names: tuple[str, str, str]) -> list[str | None]:
    """Of each number, which third of them it is in, by name; the first and the last name say where they end."""
    low, high = np.quantile([v for v in values if v is not None], [1 / 3, 2 / 3])
    told = names[0].format(low), names[1], names[2].format(high)
    return [None if v is None else told[int(v > low) + int(v > high)] for v in values]
