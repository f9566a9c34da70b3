"""Multiple choice by likelihood, as lm-evaluation-harness scores it, and calibration of the choice.

A row's choices are its metadata's `choices`, or the labels of the test set; the reference is one of them.
"""

from __future__ import annotations

import numpy as np

from tunesmith.errors import DataError
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, mean, rows

BINS = 15


def _gold(answers: Answers) -> list[int]:
    found = []
    for reference, choices in zip(answers.references, answers.choices, strict=True):
        texts = [text.strip() for text, _ in choices]
        if reference.strip() not in texts:
            raise DataError(f"'{reference[:60]}' is none of its row's choices", where="choices", fix="Mend the row.")
        found.append(texts.index(reference.strip()))
    return found


def _hits(normalised: bool) -> Metric:
    def stats(answers: Answers) -> Floats:
        hits = []
        for gold, choices in zip(_gold(answers), answers.choices, strict=True):
            scores = [-nll / (max(len(text), 1) if normalised else 1) for text, nll in choices]
            hits.append(float(int(np.argmax(scores)) == gold))
        return rows(hits)

    name = "choice_accuracy_norm" if normalised else "choice_accuracy"
    return Metric(name, stats, mean, binary=True, likelihood=True, chooses=True)


def _by_bin(answers: Answers) -> Floats:
    """Confidence, hits and rows of each bin of confidence: [n, 3 BINS]."""
    stats = np.zeros((len(answers.references), 3, BINS))
    for i, (gold, choices) in enumerate(zip(_gold(answers), answers.choices, strict=True)):
        logits = -np.asarray([nll for _, nll in choices])
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        best = int(chances.argmax())
        place = min(int(np.ceil(chances[best] * BINS)) - 1, BINS - 1)
        stats[i, :, place] = chances[best], float(best == gold), 1.0
    return stats.reshape(len(stats), -1)


def _ece(sums: Floats) -> Floats:
    """Expected calibration error (Naeini et al. 2015): how far confidence is from accuracy, over equal bins."""
    confidence, hits, count = np.moveaxis(sums.reshape(*sums.shape[:-1], 3, BINS), -2, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(confidence - hits).sum(-1) / count.sum(-1))


choice_accuracy, choice_accuracy_norm = _hits(False), _hits(True)
ece = Metric("ece", _by_bin, _ece, higher_is_better=False, likelihood=True, chooses=True)
