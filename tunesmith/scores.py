"""What a score in a scorecard looks like, and how it is written.

A score is {value, low, high, n}, or such figures for `baseline`, `tuned` and their `difference`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str, ...]


def within(value: Any, path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every score in a part of a scorecard, with its path below `path`."""
    if not isinstance(value, dict):
        return
    if ("tuned" in value and "difference" in value) or {"value", "low", "high"} <= set(value):
        yield path, value
        return
    for key, inner in value.items():
        yield from within(inner, (*path, str(key)))


def number(value: float | None) -> str:
    """Three digits behind the point; two that count where that would hide a small value."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2g}"


def signed(value: float) -> str:
    """A difference."""
    return ("+" if value >= 0 else "") + number(value)


def spanned(score: Mapping[str, float]) -> str:
    """A figure with its 95% interval."""
    return f"{number(score['value'])} {bracketed(score)}"


def bracketed(score: Mapping[str, float]) -> str:
    """A 95% interval; with how many rows it takes, where these are too few for it to be proof."""
    return f"[{number(score['low'])}, {number(score['high'])}]" + doubt(score)


def doubt(score: Mapping[str, float]) -> str:
    """What follows an interval that so few rows bear on that it is no proof."""
    return f" (no proof: takes {score['needs']:,} rows)" if "needs" in score else ""
