"""Intervals and differences. Everything is paired: the same resample of rows for both models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm, t

from tunesmith.evaluate.metrics.base import Floats, Metric

HELD_AT_ONCE = 2**22  # of the numbers of a bootstrap's draws
POWER = 0.8  # with which the smallest difference would be shown


@dataclass(frozen=True)
class Resamples:
    """`count` bootstrap resamples of n rows (Efron 1979), the same ones each time they are asked for."""

    n: int
    count: int
    seed: int

    def sums(self, stats: Floats) -> Floats:
        """The sum of rows' vectors [n, k] over each resample: [count, k], in bounded memory."""
        random = np.random.default_rng([self.seed, self.n])
        even = np.full(self.n, 1 / self.n)
        return np.concatenate([random.multinomial(self.n, even, size=size) @ stats for size in self._sizes()])

    def swaps(self, stats: Floats) -> Floats:
        """The sum of a random half of the rows' vectors [n, k], `count` times: [count, k]."""
        random = np.random.default_rng([self.seed, self.n, 1])
        return np.concatenate([random.integers(0, 2, (size, self.n)).astype(float) @ stats for size in self._sizes()])

    def _sizes(self) -> list[int]:
        chunk = max(1, HELD_AT_ONCE // self.n)
        return [min(chunk, self.count - start) for start in range(0, self.count, chunk)]


def expansion(n: int) -> float:
    """By how much a bootstrap's spread around its value is too narrow for n rows (Hesterberg 2015, section 3.4):
    a resample varies by (n - 1) / n too little, and normal quantiles stand where Student's belong."""
    return float(np.sqrt(n / (n - 1)) * t.ppf(0.975, n - 1) / norm.ppf(0.975)) if n > 1 else 1.0


def _bounds(spread: Floats, n: int) -> tuple[float, float]:
    """95% percentile interval of a bootstrap's values, with the expansion that n rows call for."""
    tail = 100 * norm.cdf(norm.ppf(0.025) * expansion(n))
    low, high = np.nanpercentile(spread, [tail, 100 - tail])
    return float(low), float(high)


def interval(metric: Metric, stats: Floats, draws: Resamples) -> dict[str, float]:
    """A metric's value with its 95% interval: Wilson's score interval for a share of rows, else the
    bootstrap's expanded percentiles. `stats` is [n, k], `draws` the resamples."""
    value = float(metric.value(stats.sum(0)))
    if metric.binary and np.all(stats[:, 1] == 1):
        hits, rows = stats.sum(0)
        return {"value": value} | wilson(round(hits), round(rows))
    low, high = _bounds(metric.value(draws.sums(stats)), len(stats))
    return {"value": value, "low": low, "high": high}


def wilson(hits: int, n: int) -> dict[str, float]:
    """The bounds of a share's 95% score interval (Wilson 1927)."""
    bounds = binomtest(hits, n).proportion_ci(method="wilson")
    return {"low": float(bounds.low), "high": float(bounds.high)}


def difference(metric: Metric, baseline: Floats, tuned: Floats, draws: Resamples) -> dict[str, float]:
    """tuned - baseline on the same rows: the paired bootstrap's 95% interval, a two-sided permutation p, and the
    smallest difference that so many rows would show in 80 of 100 tests.

    p is the share of random exchanges of the two models' answers, row by row, that make a difference as large
    (Good 2005), counting the one that was found (Phipson and Smyth 2010), so it is never 0. For shares of rows,
    `mcnemar` is the exact test on the rows that only one model has right (McNemar 1947).
    """
    spread = metric.value(draws.sums(tuned)) - metric.value(draws.sums(baseline))
    spread = spread[np.isfinite(spread)]
    low, high = _bounds(spread, len(tuned))
    value = float(metric.value(tuned.sum(0)) - metric.value(baseline.sum(0)))
    moved = draws.swaps(tuned - baseline)
    exchanged = metric.value(tuned.sum(0) - moved) - metric.value(baseline.sum(0) + moved)
    exchanged = exchanged[np.isfinite(exchanged)]
    p = (1 + np.sum(np.abs(exchanged) >= abs(value) - 1e-12)) / (len(exchanged) + 1)
    error = float(np.std(spread)) * expansion(len(tuned))
    found = {
        "value": value,
        "low": low,
        "high": high,
        "p": float(p),
        "smallest": float((norm.ppf(0.975) + norm.ppf(POWER)) * error),
    }
    if metric.binary and np.all(tuned[:, 1] == 1):
        won, lost = int(np.sum(tuned[:, 0] > baseline[:, 0])), int(np.sum(tuned[:, 0] < baseline[:, 0]))
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


def quantile(values: Sequence[float], share: float) -> dict[str, float]:
    """A quantile with its 95% interval from order statistics (binomial; David and Nagaraja 2003, section 7.1).

    Where there are so few values that none of them bounds it from above, the greatest stands there, and `needs` says
    how many it takes.
    """
    from scipy.stats import binom

    ordered, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    low, high = int(binom.ppf(0.025, n, share)) - 1, int(binom.ppf(0.975, n, share))
    value = float(np.quantile(ordered, share))
    bounds = float(ordered[max(low, 0)]), float(ordered[min(high, n - 1)])
    found = {"value": value, "low": min(bounds[0], value), "high": max(bounds[1], value)}
    return found if high < n else found | {"needs": math.ceil(math.log(0.025) / math.log(share))}


def verdict(metric: Metric, gap: dict[str, float]) -> str:
    """`better` or `worse` where the whole interval of the difference is on one side of zero, else `not_proven`."""
    low, high = (gap["low"], gap["high"]) if metric.higher_is_better else (-gap["high"], -gap["low"])
    return "better" if low > 0 else "worse" if high < 0 else "not_proven"
