"""How likely the references are under the model."""

from __future__ import annotations

import numpy as np

from tunesmith.errors import DataError
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, mean, rows


def _by_token(answers: Answers) -> Floats:
    return np.stack([np.asarray(answers.nll), np.asarray(answers.tokens, dtype=np.float64)], axis=1)


def _by_byte(answers: Answers) -> Floats:
    size = [len(r.encode()) for r in answers.references]
    return np.stack([np.asarray(answers.nll) / np.log(2), np.asarray(size, dtype=np.float64)], axis=1)


def _ranked(answers: Answers) -> Floats:
    """Whether the better ending is the likelier one, token for token; half where both are the same."""
    if not answers.pairs:
        raise DataError("preference needs rows with two endings", where="evaluate.metrics", fix="See docs/rows.md.")
    return rows([float(better < worse) + 0.5 * (better == worse) for better, worse in answers.pairs])


preference = Metric("preference", _ranked, mean, likelihood=True)
loss = Metric("loss", _by_token, mean, higher_is_better=False, likelihood=True)
perplexity = Metric("perplexity", _by_token, lambda s: np.exp(mean(s)), higher_is_better=False, likelihood=True)
bits_per_token = Metric(
    "bits_per_token", _by_token, lambda s: mean(s) / np.log(2), higher_is_better=False, likelihood=True
)
bits_per_byte = Metric("bits_per_byte", _by_byte, mean, higher_is_better=False, likelihood=True)
