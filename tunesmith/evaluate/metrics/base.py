"""What every score is made of.

A metric gives each row a vector of numbers and computes its value from the vectors' sum. Means, F1 over
fields or classes, chrF and perplexity all have that shape, so one bootstrap serves them all: a resample of
the rows is a weighted sum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.errors import DataError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """One model's answers to n rows.

    Attributes:
        given: the answers; one that failed is "".
        references: the right ones.
        nll, tokens: negative log-likelihood [n] in nats of the references under the model, and their
            lengths [n] in tokens; NaN where the model gives none.
        metadata: what else each row says, such as its choices, tests or schema.
        samples: where each prompt was answered several times, every round's answers; the first is `given`.
        choices: of each row, its choices and their negative log-likelihoods, where a metric asked for them.
        pairs: of each row, the negative log-likelihoods per token of its better and its worse ending (or what a
            reward model has in their place), where rows are preferences.
    """

    given: Sequence[str]
    references: Sequence[str]
    nll: Sequence[float]
    tokens: Sequence[int]
    metadata: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Sequence[str]] = field(default=())
    choices: Sequence[Sequence[tuple[str, float]]] = field(default=())
    pairs: Sequence[tuple[float, float]] = field(default=())

    def told(self, key: str, metric: str) -> list[Any]:
        """What each row's metadata says under a key.

        Raises:
            DataError: a row lacks it; names the metric that wants it.
        """
        found = [row.get(key) for row in self.metadata]
        if len(found) != len(self.given) or any(value is None for value in found):
            raise DataError(
                f"{metric} needs '{key}' in every row's metadata",
                where="data.sources[].keep",
                fix=f"Keep that column: sources: [{{path: ..., keep: [{key}]}}].",
            )
        return found

    def rounds(self) -> list[Answers]:
        """Each round of answers on its own."""
        return [replace(self, given=given, samples=()) for given in self.samples] or [self]


@dataclass(frozen=True)
class Metric:
    """`stats`: answers -> [n, k]; `value`: sums over rows [..., k] -> [...].

    Where `binary`, k is 2: hits, rows. Where `joint`, stats looks at all rounds of answers together. `likelihood`:
    it needs the references' likelihoods, which an endpoint does not give. `chooses`:
    it needs those of each row's choices. `details`: sums -> what else is worth
    telling (scores by class, a confusion matrix, a signature).
    """

    name: str
    stats: Callable[[Answers], Floats]
    value: Callable[[Floats], Floats]
    higher_is_better: bool = True
    binary: bool = False
    joint: bool = False
    likelihood: bool = False
    chooses: bool = False
    details: Callable[[Answers], dict[str, Any]] | None = None

    def measure(self, answers: Answers) -> Floats:
        """The rows' vectors [n, k], over all rounds of answers: a row is the unit, however often it was answered."""
        if self.joint or self.likelihood or len(answers.samples) < 2:
            return self.stats(answers)
        return np.sum([self.stats(given) for given in answers.rounds()], axis=0)

    def row(self, stats: Floats) -> list[float | None]:
        """Each row's own value, None where a single row has none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.asarray(self.value(stats), dtype=np.float64)
        return [float(v) if np.isfinite(v) else None for v in values]


def mean(sums: Floats) -> Floats:
    """First sum over second."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(sums[..., 0] / sums[..., 1])


def rows(values: Sequence[float]) -> Floats:
    """Each row's value beside a 1, so that the ratio of the sums is the mean."""
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)


def measured(name: str, value: Callable[[Floats], Floats], **told: Any) -> Metric:
    """A metric of vectors that are measured elsewhere, not taken from answers: only `value` is asked of it."""

    def stats(answers: Answers) -> Floats:
        raise TypeError(f"{name} is not a metric of answers")

    return Metric(name, stats, value, **told)


def by_row(name: str, score: Callable[[str, str], float], **told: Any) -> Metric:
    """A metric that is the mean of a function of (answer, reference)."""

    def stats(answers: Answers) -> Floats:
        return rows([float(score(g, r)) for g, r in zip(answers.given, answers.references, strict=True)])

    return Metric(name, stats, mean, **told)


def f1(true_positive: Floats, false_positive: Floats, false_negative: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(2 * true_positive / (2 * true_positive + false_positive + false_negative))


def counted(sums: Floats, which: str) -> Floats:
    """precision, recall or f1 from sums of (true positives, false positives, false negatives) [..., 3];
    0 where nothing was to be found."""
    hits, wrong, missed = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "precision": hits / (hits + wrong),
            "recall": hits / (hits + missed),
            "f1": 2 * hits / (2 * hits + wrong + missed),
        }[which]
    return np.asarray(np.nan_to_num(found))


def parse(text: str) -> Any:
    """The JSON object in an answer, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def same(given: str, reference: str) -> bool:
    """Equal as JSON where the reference is a JSON object, else as text without the space around it."""
    wanted = parse(reference)
    return parse(given) == wanted if wanted is not None else given.strip() == reference.strip()


exact_match = by_row("exact_match", same, binary=True)
accuracy = by_row("accuracy", same, binary=True)
