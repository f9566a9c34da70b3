"""What scores rest on. Everything is paired: the same resample of rows for both models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm

from tunesmith.evaluate.conditions import SHOWN
from tunesmith.evaluate.metrics.base import Floats, Metric, mean, rows
from tunesmith.intervals import REACH, Resamples, bootstrap, of_sums, paired_shares, pulls, share

POWER = 0.8  # with which the smallest difference would be shown


def interval(metric: Metric, stats: Floats, draws: Resamples) -> dict[str, float]:
    """A metric's value with its 95% interval: Wilson's score interval for a share of rows, else the bootstrap's.
    `stats` is [n, k], `draws` the resamples."""
    if _is_share(metric, stats):
        hits, count = stats.sum(0)
        return {"value": float(hits / count)} | share(round(hits), round(count))
    return of_sums(metric.value, stats, draws)


def _is_share(metric: Metric, stats: Floats) -> bool:
    return metric.binary and bool(np.all(stats[:, 1] == 1))


def preference(worths: Sequence[float], draws: Resamples) -> dict[str, float]:
    """The mean of n rows' worths with its interval. Where a row is won, lost or a tie (1, 0, 0.5), wins less losses
    are the difference of two shares of the same rows."""
    won, lost, n = sum(w == 1 for w in worths), sum(w == 0 for w in worths), len(worths)
    if won + lost + sum(w == 0.5 for w in worths) < n:
        return of_sums(mean, rows(worths), draws)
    bounds = paired_shares(won, lost, n)
    return {"value": float(np.mean(worths))} | {end: (1 + bound) / 2 for end, bound in bounds.items()}


def difference(metric: Metric, baseline: Floats, tuned: Floats, draws: Resamples) -> dict[str, float]:
    """tuned - baseline on the same rows: its 95% interval (Tango's for shares of rows, else the paired bootstrap's),
    a two-sided permutation p, and the smallest difference that so many rows would show in 80 of 100 tests.

    p is the share of random exchanges of the two models' answers, row by row, that make a difference as large
    (Good 2005), counting the one that was found (Phipson and Smyth 2010), so it is never 0. For shares of rows,
    `mcnemar` is the exact test on the rows that only one model has right (McNemar 1947).
    """
    value = float(metric.value(tuned.sum(0)) - metric.value(baseline.sum(0)))
    binary = _is_share(metric, tuned)
    won, lost = int(np.sum(tuned[:, 0] > baseline[:, 0])), int(np.sum(tuned[:, 0] < baseline[:, 0]))
    if binary:
        bounds = paired_shares(won, lost, len(tuned))
    else:
        spread = metric.value(draws.sums(tuned)) - metric.value(draws.sums(baseline))
        pulled = pulls(metric.value, tuned) - pulls(metric.value, baseline)
        bounds = bootstrap(value, spread, pulled, len(tuned))
    moved = draws.swaps(tuned - baseline)
    exchanged = metric.value(tuned.sum(0) - moved) - metric.value(baseline.sum(0) + moved)
    exchanged = exchanged[np.isfinite(exchanged)]
    p = (1 + np.sum(np.abs(exchanged) >= abs(value) - 1e-12)) / (len(exchanged) + 1)
    reach = (bounds["high"] - bounds["low"]) / 2
    found = {"value": value} | bounds | {"p": float(p), "smallest": reach * float(1 + norm.ppf(POWER) / REACH)}
    if binary:
        found["mcnemar"] = float(binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return found


def compared(metric: Metric, stats: Mapping[str, Floats], count: int, seed: int) -> dict[str, Any]:
    """A score as scorecards hold it: each side with its interval, their difference, the number of rows."""
    n = len(stats["tuned"])
    draws = Resamples(n, count, seed)
    return {
        "baseline": interval(metric, stats["baseline"], draws),
        "tuned": interval(metric, stats["tuned"], draws),
        "difference": difference(metric, stats["baseline"], stats["tuned"], draws),
        "n": n,
        "higher_is_better": metric.higher_is_better,
    }


def holm(scores: Mapping[str, dict[str, Any]]) -> None:
    """Add to each score's difference `p_holm`, its p corrected for the number of scores (Holm 1979)."""
    gaps = sorted((score["difference"] for score in scores.values()), key=lambda gap: gap["p"])
    highest = 0.0
    for place, gap in enumerate(gaps):
        highest = max(highest, min(1.0, gap["p"] * (len(gaps) - place)))
        gap["p_holm"] = highest


def verdict(metric: Metric, gap: dict[str, float]) -> str:
    """`better` or `worse` where the whole interval of the difference is on one side of zero, else `not_proven`; so it
    is where too few rows bear on the interval, unless the permutation test shows that there is a difference."""
    if "needs" in gap and gap["p"] >= SHOWN:
        return "not_proven"
    low, high = (gap["low"], gap["high"]) if metric.higher_is_better else (-gap["high"], -gap["low"])
    return "better" if low > 0 else "worse" if high < 0 else "not_proven"
