"""How far annotators agree, and one label of many."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from tunesmith.data.labels.judgements import Judgement
from tunesmith.errors import DataError, MachineError, nearest

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

    Cohen's kappa is of each pair of annotators who share items, and their mean (scikit-learn); Fleiss' kappa of the
    items that the most common number of people judged (statsmodels); Krippendorff's alpha of all that two or more
    judged (krippendorff), with a 95% interval from a bootstrap over items.

    Raises:
        DataError: no item has two judgements, or labels that are not numbers are to be compared as such.
    """
    try:
        import krippendorff
        from statsmodels.stats.inter_rater import fleiss_kappa
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

    random = np.random.default_rng(seed)
    drawn = [alpha(counts_IL[random.integers(0, len(counts_IL), len(counts_IL))]) for _ in range(RESAMPLES)]
    drawn = [a for a in drawn if not np.isnan(a)]
    pairs = _cohen(votes)
    weights = [n for _, _, _, n in pairs]
    fleiss = counts_IL[n_I == raters]
    return {
        "items": len(votes),
        "items judged by two or more": len(shared),
        "annotators": len({j.annotator for j in judgements}),
        "judgements": len(judgements),
        "judged twice by one annotator": twice,
        "labels": {label: int(n) for label, n in zip(labels, counts_IL.sum(0), strict=True)},
        "agreeing pairs": round(float(agreeing), 4),
        "cohen": {
            "mean": round(float(np.average([k for _, _, k, _ in pairs], weights=weights)), 4) if pairs else None,
            "pairs": [{"annotators": [a, b], "kappa": round(k, 4), "items": n} for a, b, k, n in pairs],
        },
        "fleiss": {
            "kappa": round(float(fleiss_kappa(fleiss)), 4) if (fleiss.sum(0) > 0).sum() > 1 else None,
            "items": len(fleiss),
            "raters": raters,
        },
        "krippendorff": {
            "alpha": None if np.isnan(alpha(counts_IL)) else round(alpha(counts_IL), 4),
            "interval": [round(float(q), 4) for q in np.quantile(drawn, [0.025, 0.975])] if drawn else None,
            "level": level,
            "items": len(shared),
        },
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


def _cohen(votes: dict[str, dict[str, str]]) -> list[tuple[str, str, float, int]]:
    from sklearn.metrics import cohen_kappa_score

    common: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for by in votes.values():
        for a, b in itertools.combinations(sorted(by), 2):
            common.setdefault((a, b), []).append((by[a], by[b]))
    found = []
    for (a, b), both in sorted(common.items()):
        one, other = zip(*both, strict=True)
        if len(both) >= SHARED_AT_LEAST and len(set(one) | set(other)) > 1:
            found.append((a, b, float(cohen_kappa_score(one, other)), len(both)))
    return found


def _disagreements(shared: dict[str, dict[str, str]]) -> list[dict[str, Any]]:
    """Items that people label differently, the most evenly divided first."""
    listed = [
        {"item": item, "votes": dict(Counter(by.values()).most_common()), "by": by}
        for item, by in shared.items()
        if len(set(by.values())) > 1
    ]
    return sorted(listed, key=lambda d: (max(d["votes"].values()) / sum(d["votes"].values()), d["item"]))
