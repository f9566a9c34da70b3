"""Labels: one of a set (precision, recall, F1, confusion) or several of it (separated by commas or a JSON list)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, counted, f1, mean, rows

CONFUSED_AT_MOST = 40  # classes of a confusion matrix


def classes_of(answers: Answers) -> list[str]:
    return sorted({r.strip() for r in answers.references})


def _by_class(answers: Answers) -> Floats:
    """True positives, false positives and false negatives of each class in the references: [n, 3 classes]."""
    places = {label: i for i, label in enumerate(classes_of(answers))}
    stats = np.zeros((len(answers.given), 3, len(places)))
    for i, (given, reference) in enumerate(zip(answers.given, answers.references, strict=True)):
        wanted, got = places[reference.strip()], places.get(given.strip())
        if got == wanted:
            stats[i, 0, wanted] = 1
        else:
            stats[i, 2, wanted] = 1
            if got is not None:
                stats[i, 1, got] = 1
    return stats.reshape(len(answers.given), -1)


def _classes(sums: Floats) -> Floats:
    """[..., 3 classes] -> [..., classes, 3]"""
    return np.moveaxis(sums.reshape(*sums.shape[:-1], 3, -1), -2, -1)


def _macro(which: str) -> Callable[[Floats], Floats]:
    def value(sums: Floats) -> Floats:
        found = counted(_classes(sums), which)
        by = _classes(sums)
        there = (by[..., 0] + by[..., 2]) > 0  # a resample may hold no row of a class
        with np.errstate(invalid="ignore"):
            return np.asarray(np.where(there, found, 0).sum(-1) / there.sum(-1))

    return value


def _macro_f1(sums: Floats) -> Floats:
    by_class = f1(*np.moveaxis(_classes(sums), -1, 0))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nanmean(by_class, axis=-1))


def _micro(which: str) -> Callable[[Floats], Floats]:
    return lambda sums: counted(_classes(sums).sum(-2), which)


def _weighted_f1(sums: Floats) -> Floats:
    by = _classes(sums)
    support = by[..., 0] + by[..., 2]
    with np.errstate(invalid="ignore"):
        return np.asarray((counted(by, "f1") * support).sum(-1) / support.sum(-1))


def told(answers: Answers) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class, and how often each was taken for which."""
    labels, by = classes_of(answers), _classes(_by_class(answers).sum(0))
    scores = {which: counted(by, which) for which in ("precision", "recall", "f1")}
    found: dict[str, Any] = {
        "classes": {
            label: {which: float(scores[which][i]) for which in scores} | {"n": int(by[i, 0] + by[i, 2])}
            for i, label in enumerate(labels)
        }
    }
    if len(labels) <= CONFUSED_AT_MOST:
        columns = [*labels, ""]  # the last: anything else
        places = {label: i for i, label in enumerate(labels)}
        matrix = np.zeros((len(labels), len(columns)), dtype=int)
        for given, reference in zip(answers.given, answers.references, strict=True):
            matrix[places[reference.strip()], places.get(given.strip(), len(labels))] += 1
        found["confusion"] = {"labels": columns, "counts": matrix.tolist()}
    return found


def label_set(text: str) -> frozenset[str]:
    """The labels of an answer: a JSON list, or parts between commas, semicolons or lines."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, list):
        return frozenset(str(v).strip() for v in value)
    return frozenset(part.strip() for part in text.replace(";", ",").replace("\n", ",").split(",") if part.strip())


def _sets(answers: Answers) -> list[tuple[frozenset[str], frozenset[str]]]:
    return [(label_set(g), label_set(r)) for g, r in zip(answers.given, answers.references, strict=True)]


def _by_set(answers: Answers) -> Floats:
    found = [(len(g & r), len(g - r), len(r - g)) for g, r in _sets(answers)]
    return np.asarray(found, dtype=np.float64).reshape(-1, 3)


def _by_label(answers: Answers) -> Floats:
    pairs = _sets(answers)
    labels = sorted(frozenset().union(*(r for _, r in pairs)))
    stats = np.asarray([[[x in g and x in r, x in g - r, x in r - g] for x in labels] for g, r in pairs], dtype=float)
    return stats.transpose(0, 2, 1).reshape(len(pairs), -1)


macro_f1 = Metric("macro_f1", _by_class, _macro_f1, details=told)
macro_precision = Metric("macro_precision", _by_class, _macro("precision"))
macro_recall = Metric("macro_recall", _by_class, _macro("recall"))
micro_f1 = Metric("micro_f1", _by_class, _micro("f1"))
micro_precision = Metric("micro_precision", _by_class, _micro("precision"))
micro_recall = Metric("micro_recall", _by_class, _micro("recall"))
weighted_f1 = Metric("weighted_f1", _by_class, _weighted_f1)
multilabel_f1 = Metric("multilabel_f1", _by_set, lambda sums: counted(sums, "f1"))
multilabel_macro_f1 = Metric("multilabel_macro_f1", _by_label, _macro("f1"))
multilabel_exact = Metric("multilabel_exact", lambda a: rows([float(g == r) for g, r in _sets(a)]), mean, binary=True)
