"""Charts as inline SVG: numbers in, a string out. Colours come from the page's style sheet, by class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 28, 26


@dataclass(frozen=True)
class Series:
    """Points (x, y) drawn as a line or as dots, in the style of a CSS class."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values laid over a range of pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each point's mean with a twentieth of all, as many before it as behind so that nothing lags."""
    kept = finite(points)
    reach = max(1, len(kept) // 40)
    smoothed = []
    for i, (x, _) in enumerate(kept):
        near = min(reach, i, len(kept) - 1 - i)
        smoothed.append((x, math.fsum(y for _, y in kept[i - near : i + near + 1]) / (2 * near + 1)))
    return smoothed


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that span a range: about so many, from at or below `low` to at or above `high`."""
    if not high > low:
        margin = abs(low) / 10 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next((s for s in (1, 2, 2.5, 5) if s * magnitude >= rough), 10) * magnitude
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def curves(
    title: str,
    series: Sequence[Series],
    size: tuple[int, int] = (600, 300),
    style: str = "wide",
    about: int = 5,
) -> str:
    """Lines and dots over training steps, with numbered axes; the page holds the legend."""
    width, height = size
    shown = [Series(s.name, s.style, finite(s.points), s.dots) for s in series]
    points = [point for s in shown for point in s.points]
    if not points:
        return ""
    marks_x = [x for x in ticks(min(x for x, _ in points), max(x for x, _ in points), about) if x == int(x)]
    marks_y = ticks(min(y for _, y in points), max(y for _, y in points), about - 1)
    across = Axis(min(x for x, _ in points) - 0.5, max(x for x, _ in points) + 0.5, LEFT, width - RIGHT)
    up = Axis(marks_y[0], marks_y[-1], height - BOTTOM, TOP)
    parts = [_text(LEFT, 14, title, "title", "start")]
    for y in marks_y:
        parts.append(_line(LEFT, up(y), width - RIGHT, up(y), "grid"))
        parts.append(_text(LEFT - 6, up(y) + 4, f"{y:g}", "tick", "end"))
    for x in marks_x:
        if across.low <= x <= across.high:
            parts.append(_text(across(x), height - BOTTOM + 19, f"{x:g}", "tick", "middle"))
    for s in shown:
        placed = [(across(x), up(y)) for x, y in s.points]
        if s.dots or len(placed) == 1:
            parts += [f'<circle class="dot {s.style}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in placed]
        elif placed:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            parts.append(f'<polyline class="curve {s.style}" points="{path}"/>')
    return _svg(width, height, title, style, parts)


def intervals(title: str, rows: Sequence[tuple[str, str, float, float, float]]) -> str:
    """Values with their intervals on one scale. A row is (label, style, value, low, high)."""
    width, left, right = 320, 72, 22
    bounds = [b for row in rows for b in row[2:] if math.isfinite(b)]
    if not bounds:
        return ""
    height = 24 * len(rows) + 26
    marks = ticks(min(bounds), max(bounds))
    across = Axis(marks[0], marks[-1], left, width - right)
    foot = height - 22
    parts = [_line(across(x), 4, across(x), foot, "grid") for x in marks]
    parts += [_text(across(x), foot + 16, f"{x:g}", "tick", "middle") for x in marks]
    for i, (label, style, value, low, high) in enumerate(rows):
        y = 24 * i + 18
        parts.append(_text(left - 10, y + 4, label, "tick", "end"))
        if math.isfinite(low) and math.isfinite(high):
            parts.append(_line(across(low), y, across(high), y, f"whisker {style}"))
            parts += [_line(across(end), y - 5, across(end), y + 5, f"cap {style}") for end in (low, high)]
        if math.isfinite(value):
            parts.append(f'<circle class="dot {style}" cx="{across(value):.1f}" cy="{y}" r="4.5"/>')
    return _svg(width, height, title, "small", parts)


def _svg(width: int, height: int, title: str, style: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="chart {style}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def bars(title: str, rows: Sequence[tuple[str, float]], style: str = "tuned", note: Sequence[str] = ()) -> str:
    """Lying bars, one a row: (label, value). `note` stands behind each bar in place of its value."""
    if not rows:
        return ""
    width, left, right, high = 600, 170, 84, 22
    most = max((value for _, value in rows), default=0) or 1
    parts = []
    for i, (label, value) in enumerate(rows):
        y = high * i + 6
        length = (width - left - right) * value / most
        parts.append(_text(left - 8, y + 12, label if len(label) <= 26 else f"{label[:25]}…", "tick", "end"))
        parts.append(f'<rect class="{style}" x="{left}" y="{y}" width="{max(length, 0.5):.1f}" height="{high - 6}"/>')
        parts.append(_text(left + length + 6, y + 12, note[i] if note else f"{value:,.0f}", "tick", "start"))
    return _svg(width, high * len(rows) + 12, title, "wide", parts)


def histogram(title: str, values: Sequence[float], style: str = "tuned", limit: float | None = None) -> str:
    """How often values fall into about 30 steps of equal width, with a line at `limit`."""
    shown = [v for v in values if math.isfinite(v)]
    if not shown:
        return ""
    marks = ticks(min(0.0, *shown), max(*shown, limit or 0, 1.0) if len(shown) > 1 else max(shown[0], limit or 0, 1.0))
    steps, width, height = 30, 600, 190
    across = Axis(marks[0], marks[-1], LEFT, width - RIGHT)
    size = (marks[-1] - marks[0]) / steps
    counts = [0] * steps
    for value in shown:
        counts[min(int((value - marks[0]) / size), steps - 1)] += 1
    levels = ticks(0, max(counts), 3)
    up = Axis(0, levels[-1], height - BOTTOM, TOP)
    parts = [_text(LEFT, 14, title, "title", "start")]
    for level in levels:
        parts.append(_line(LEFT, up(level), width - RIGHT, up(level), "grid"))
        parts.append(_text(LEFT - 6, up(level) + 4, f"{level:g}", "tick", "end"))
    parts += [_text(across(x), height - BOTTOM + 19, f"{x:g}", "tick", "middle") for x in marks]
    for i, count in enumerate(counts):
        if count:
            x, wide = across(marks[0] + i * size), across(size) - across(0)
            parts.append(
                f'<rect class="{style}" x="{x:.1f}" y="{up(count):.1f}" width="{wide - 1:.1f}" '
                f'height="{height - BOTTOM - up(count):.1f}"/>'
            )
    if limit is not None:
        parts.append(_line(across(limit), TOP, across(limit), height - BOTTOM, "baseline"))
    return _svg(width, height, title, "wide", parts)
