"""How far annotators agree, and one label of many."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from tunesmith.agreement import fleiss, kappa
from tunesmith.data.labels.judgements import Judgement
from tunesmith.errors import DataError, MachineError, nearest
from tunesmith.intervals import bootstrap

RESAMPLES = 500
SHARED_AT_LEAST = 5  # items that two annotators must share for a kappa of theirs
Level = Literal["nominal", "ordinal", "interval", "ratio"]
Way = Literal["majority", "dawid_skene"]
EXTRA = "Install it: pip install 'tunesmith[labels]'"


def level_named(name: str) -> Level:
    """A level of measurement by its name."""
    return _named(name, get_args(Level), "--level")  # type: ignore[return-value]


def way_named(name: str) -> Way:
    """A way of adjudication by its name."""
    return _named(name, get_args(Way), "--adjudicate")  # type: ignore[return-value]


def _named(name: str, known: Sequence[str], where: str) -> str:
    if name not in known:
        raise DataError(f"there is no '{name}'{nearest(name, known)}", where=where, fix=f"Known: {', '.join(known)}.")
    return name


def agreement(judgements: Sequence[Judgement], level: Level = "nominal", seed: int = 7) -> dict[str, Any]:
    """Figures of agreement: shares, Cohen's, Fleiss' and Krippendorff's coefficients, and where people differ.

    Cohen's kappa is of each pair of annotators who share items, and their mean; Fleiss' kappa of the items that the
    most common number of people judged; Krippendorff's alpha of all that two or more judged (krippendorff's, for labels
    with an order, too). Each has its 95% interval, from a bootstrap over items, and where that is no proof `needs`.

    Raises:
        DataError: no item has two judgements, or labels that are not numbers are to be compared as such.
    """
    try:
        import krippendorff
    except ImportError as error:
        raise MachineError(f"needs the package '{error.name}'", where="agreement", fix=EXTRA) from error

    votes, twice = _votes(judgements)
    labels = _ordered({label for by in votes.values() for label in by.values()}, level)
    shared = {item: by for item, by in votes.items() if len(by) >= 2}
    if not shared:
        raise DataError(
            "no item was judged by two people", where="agreement", fix="Agreement needs items that several judged."
        )
    counts_IL = np.array([[list(by.values()).count(label) for label in labels] for by in shared.values()])
    n_I = counts_IL.sum(1)
    pairs_I = n_I * (n_I - 1)
    agreeing = (counts_IL * (counts_IL - 1)).sum() / pairs_I.sum()
    raters = Counter(n_I.tolist()).most_common(1)[0][0]
    domain: Any = labels if level == "nominal" else [float(label) for label in labels]

    def alpha(counts: Any) -> float:
        if (counts.sum(0) > 0).sum() < 2:  # one label alone: nothing could have differed
            return float("nan")
        return float(krippendorff.alpha(value_counts=counts, value_domain=domain, level_of_measurement=level))

    whole, pairs = alpha(counts_IL), _cohen(votes, labels, seed)
    weights = [pair["items"] for pair in pairs]
    alike = fleiss(counts_IL[n_I == raters].astype(float), seed) or {}
    return {
        "items": len(votes),
        "items judged by two or more": len(shared),
        "annotators": len({j.annotator for j in judgements}),
        "judgements": len(judgements),
        "judged twice by one annotator": twice,
        "labels": {label: int(n) for label, n in zip(labels, counts_IL.sum(0), strict=True)},
        "agreeing pairs": round(float(agreeing), 4),
        "cohen": {
            "mean": round(sum(p["kappa"] * p["items"] for p in pairs) / sum(weights), 4) if pairs else None,
            "pairs": pairs,
        },
        "fleiss": {
            "kappa": round(alike["value"], 4) if alike else None,
            "items": int(np.sum(n_I == raters)),
            "raters": raters,
        }
        | _span(alike),
        "krippendorff": {
            "alpha": None if np.isnan(whole) else round(whole, 4),
            "level": level,
            "items": len(shared),
        }
        | _span({} if np.isnan(whole) else _bootstrapped(alpha, counts_IL, whole, seed)),
        "disagreements": _disagreements(shared),
    }


def adjudicate(judgements: Sequence[Judgement], how: Way) -> list[dict[str, Any]]:
    """One label for each item: {item, label, confidence, votes}. A tie of the majority has no label.

    `dawid_skene` weighs each annotator by how far they can be trusted on each label, which it learns from how they
    agree (Dawid and Skene 1979; crowd-kit's). `confidence` is its posterior, or the majority's share.
    """
    votes, _ = _votes(judgements)
    likely: dict[str, dict[str, float]] = {}
    if how == "dawid_skene":
        try:
            import pandas as pd
            from crowdkit.aggregation import DawidSkene
        except ImportError as error:
            raise MachineError(f"needs the package '{error.name}'", where="adjudicate", fix=EXTRA) from error
        table = pd.DataFrame(
            [(item, who, label) for item, by in votes.items() for who, label in by.items()],
            columns=["task", "worker", "label"],
        )
        found = DawidSkene(n_iter=100).fit_predict_proba(table)
        likely = {str(item): row for item, row in found.to_dict("index").items()}
    else:
        likely = {i: {label: n / len(by) for label, n in Counter(by.values()).items()} for i, by in votes.items()}
    rows = []
    for item, by in votes.items():
        ranked = sorted(likely[item].items(), key=lambda pair: (-pair[1], pair[0]))
        tie = len(ranked) > 1 and ranked[0][1] - ranked[1][1] < 1e-9
        rows.append({
            "item": item,
            "label": None if tie else ranked[0][0],
            "confidence": round(float(ranked[0][1]), 4),
            "votes": dict(Counter(by.values()).most_common()),
        })  # fmt: skip
    return rows


def _votes(judgements: Sequence[Judgement]) -> tuple[dict[str, dict[str, str]], int]:
    """item -> annotator -> label (the last one said), and how often one annotator judged an item again."""
    votes: dict[str, dict[str, str]] = {}
    twice = 0
    for item, who, label in judgements:
        by = votes.setdefault(item, {})
        twice += who in by
        by[who] = label
    return votes, twice


def _ordered(labels: set[str], level: Level) -> list[str]:
    if level == "nominal":
        return sorted(labels)
    try:
        return sorted(labels, key=float)
    except ValueError as error:
        raise DataError(
            f"level {level} compares numbers ({error})", where="--level", fix="Use nominal for labels that are words."
        ) from error


def _bootstrapped(alpha: Callable[[Any], float], counts_IL: Any, whole: float, seed: int) -> dict[str, float]:
    """The interval of a coefficient that is no function of sums: each resample, and all items but one, by itself
    (items of which the same was said are left out once)."""
    random, n = np.random.default_rng(seed), len(counts_IL)
    spread = np.array([alpha(counts_IL[random.integers(0, n, n)]) for _ in range(RESAMPLES)])
    _, first, kind_I = np.unique(counts_IL, axis=0, return_index=True, return_inverse=True)
    pulled_I = np.nan_to_num([whole - alpha(np.delete(counts_IL, i, 0)) for i in first])[kind_I.ravel()]
    return bootstrap(whole, spread, pulled_I - pulled_I.mean(), n)


def _span(score: Mapping[str, float]) -> dict[str, Any]:
    """A score's interval, and how many items it would take where it is no proof."""
    interval = [round(score["low"], 4), round(score["high"], 4)] if score else None
    return {"interval": interval} | ({"needs": score["needs"]} if "needs" in score else {})


def _cohen(votes: dict[str, dict[str, str]], labels: list[str], seed: int) -> list[dict[str, Any]]:
    common: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for by in votes.values():
        for a, b in itertools.combinations(sorted(by), 2):
            common.setdefault((a, b), []).append((by[a], by[b]))
    found = []
    for (a, b), both in sorted(common.items()):
        one, other = zip(*both, strict=True)
        score = kappa(one, other, labels, seed=seed) if len(both) >= SHARED_AT_LEAST else None
        if score is not None:
            told = {"annotators": [a, b], "kappa": round(score["value"], 4), "items": len(both)}
            found.append(told | _span(score))
    return found


def _disagreements(shared: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Items that people label differently, the most evenly divided first."""
    listed = [
        {"item": item, "votes": dict(Counter(by.values()).most_common()), "by": by}
        for item, by in shared.items()
        if len(set(by.values())) > 1
    ]
    return sorted(listed, key=lambda d: (max(d["votes"].values()) / sum(d["votes"].values()), d["item"]))
