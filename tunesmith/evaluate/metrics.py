"""Scores of answers against references.

A metric gives each row a vector of numbers and computes its value from the vectors' sum. Means, F1 over
fields or classes, chrF and perplexity all have that shape, so one bootstrap serves them all: a resample of
the rows is a weighted sum.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """One model's answers to n rows.

    Attributes:
        given: the answers.
        references: the right ones.
        nll, tokens: negative log-likelihood [n] in nats of the references under the model, and their
            lengths [n] in tokens.
    """

    given: Sequence[str]
    references: Sequence[str]
    nll: Sequence[float]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Metric:
    """`stats`: answers -> [n, k]; `value`: sums over rows [..., k] -> [...]. Where `binary`, k is 2: hits, rows."""

    name: str
    stats: Callable[[Answers], Floats]
    value: Callable[[Floats], Floats]
    higher_is_better: bool = True
    binary: bool = False


def _mean(sums: Floats) -> Floats:
    return np.asarray(sums[..., 0] / sums[..., 1])


def _rows(values: Sequence[float]) -> Floats:
    """Each row's value beside a 1, so that the ratio of the sums is the mean."""
    return np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))], axis=1)


def _f1(true_positive: Floats, false_positive: Floats, false_negative: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * true_positive / (2 * true_positive + false_positive + false_negative))


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


def _exact(answers: Answers) -> Floats:
    return _rows([float(same(g, r)) for g, r in zip(answers.given, answers.references, strict=True)])


def _by_class(answers: Answers) -> Floats:
    """True positives, false positives and false negatives of each class in the references: [n, 3 classes]."""
    classes = {label: i for i, label in enumerate(sorted({r.strip() for r in answers.references}))}
    stats = np.zeros((len(answers.given), 3, len(classes)))
    for i, (given, reference) in enumerate(zip(answers.given, answers.references, strict=True)):
        wanted, got = classes[reference.strip()], classes.get(given.strip())
        if got == wanted:
            stats[i, 0, wanted] = 1
        else:
            stats[i, 2, wanted] = 1
            if got is not None:
                stats[i, 1, got] = 1
    return stats.reshape(len(answers.given), -1)


def _macro_f1(sums: Floats) -> Floats:
    by_class = _f1(*np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, 0))
    return np.asarray(np.nanmean(by_class, axis=-1))


def fields(value: Any, path: str = "") -> set[tuple[str, str]]:
    """The leaves of a JSON value as (path, value as JSON)."""
    if isinstance(value, dict) and value:
        return {leaf for key, inner in value.items() for leaf in fields(inner, f"{path}/{key}")}
    if isinstance(value, list) and value:
        return {leaf for i, inner in enumerate(value) for leaf in fields(inner, f"{path}/{i}")}
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = float(value)
    return {(path, json.dumps(value))}


def _by_field(answers: Answers) -> Floats:
    stats = []
    for given, reference in zip(answers.given, answers.references, strict=True):
        wanted, got = fields(parse(reference)), fields(parse(given)) if parse(given) is not None else set()
        stats.append([len(wanted & got), len(got - wanted), len(wanted - got)])
    return np.asarray(stats, dtype=np.float64)


def _rouge_l(answers: Answers) -> Floats:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(answers.given, answers.references, strict=True)
    return _rows([scorer.score(reference, given)["rougeL"].fmeasure for given, reference in pairs])


def _chrf_stats(answers: Answers) -> Floats:
    """For each n-gram order: n-grams in the answer, in the reference, and in both (Popović 2015)."""
    from sacrebleu.metrics import CHRF

    stats = CHRF()._extract_corpus_statistics(list(answers.given), [list(answers.references)])
    return np.asarray(stats, dtype=np.float64)


def _chrf(sums: Floats) -> Floats:
    """chrF2 in percent, as sacrebleu computes it: precision and recall are averaged over the orders."""
    given, reference, both = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    counted = (given > 0) & (reference > 0)
    orders = np.maximum(counted.sum(-1), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(counted, both / given, 0.0).sum(-1) / orders
        recall = np.where(counted, both / reference, 0.0).sum(-1) / orders
        score = 5 * precision * recall / (4 * precision + recall)
    return np.asarray(100 * np.nan_to_num(score))


def _likelihood(answers: Answers) -> Floats:
    return np.stack([np.asarray(answers.nll), np.asarray(answers.tokens, dtype=np.float64)], axis=1)


exact_match = Metric("exact_match", _exact, _mean, binary=True)
accuracy = Metric("accuracy", _exact, _mean, binary=True)
macro_f1 = Metric("macro_f1", _by_class, _macro_f1)
json_valid = Metric("json_valid", lambda a: _rows([float(parse(g) is not None) for g in a.given]), _mean, binary=True)
json_field_f1 = Metric("json_field_f1", _by_field, lambda sums: _f1(*np.moveaxis(sums, -1, 0)))
rouge_l = Metric("rouge_l", _rouge_l, _mean)
chrf = Metric("chrf", _chrf_stats, _chrf)
loss = Metric("loss", _likelihood, _mean, higher_is_better=False)
perplexity = Metric("perplexity", _likelihood, lambda sums: np.exp(_mean(sums)), higher_is_better=False)

FITTING = {
    "json": ("exact_match", "json_valid", "json_field_f1", "loss", "perplexity"),
    "label": ("accuracy", "macro_f1", "loss", "perplexity"),
    "text": ("rouge_l", "chrf", "loss", "perplexity"),
    "none": ("loss", "perplexity"),
}
