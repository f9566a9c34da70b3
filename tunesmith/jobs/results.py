"""A job's result file: its metrics as the CSV that OpenAI gives."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable
from typing import Any

from tunesmith.jobs.board import metrics_of

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


def result_csv(lines: Iterable[dict[str, Any]]) -> bytes:
    """A line a step; what was not measured at a step is blank."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for line in lines:
        found = metrics_of(line)
        found["train_accuracy"] = found.get("train_mean_token_accuracy")
        rows.writerow([line["step"], *(_cell(found.get(name)) for name in COLUMNS[1:])])
    return text.getvalue().encode()


def encoded(content: bytes) -> bytes:
    """As OpenAI serves it."""
    return base64.b64encode(content)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
