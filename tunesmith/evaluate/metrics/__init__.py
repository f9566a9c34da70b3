"""Scores of answers against references: a file per family."""

from __future__ import annotations

from tunesmith.evaluate.metrics.base import Answers, Floats, Metric

__all__ = ["FITTING", "Answers", "Floats", "Metric"]

FITTING = {
    "json": ("exact_match", "json_valid", "json_field_f1", "loss", "perplexity"),
    "label": ("accuracy", "macro_f1", "loss", "perplexity"),
    "text": ("rouge_l", "chrf", "loss", "perplexity"),
    "none": ("loss", "perplexity"),
    "preference": ("preference",),
}
