"""The data report: a prepared set in one HTML page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tunesmith import charts

LABELS_AT_MOST = 40


def page(name: str, found: Mapping[str, Any]) -> str:
    """The page of what `survey` found."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"grouped": lambda n: f"{n:,.0f}", "percent": lambda x: f"{x:.1%}"}
    fall = found["waterfall"]
    read = fall[0][1] or 1
    notes = [f"{n:,} ({n / read:.1%})" for _, n in fall]
    privacy = found["checks"]["personal data"]["found"]
    drawn = {
        "waterfall": charts.bars("Rows after each step", fall, note=notes),
        "tokens": charts.histogram(
            "Tokens of a training row", found["lengths"]["tokens"], limit=found["lengths"]["limit"]
        ),
        "labels": charts.bars("Training rows of each label", _most(found["labels"].get("train", {}))),
        "languages": charts.bars("Language of the rows looked at", _most(found["languages"])),
        "privacy": charts.bars("Personal data in the rows looked at, by kind", _most(privacy), "baseline"),
    }
    template = environment.get_template("report.html.jinja")
    return template.render(name=name, found=found, charts={k: Markup(svg) for k, svg in drawn.items()})


def _most(counts: Mapping[str, int]) -> list[tuple[str, float]]:
    ordered = sorted(counts.items(), key=lambda c: -c[1])
    rest = sum(n for _, n in ordered[LABELS_AT_MOST:])
    return [*ordered[:LABELS_AT_MOST], *([("all others", rest)] if rest else [])]
