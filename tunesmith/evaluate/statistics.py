"""Intervals and differences. Everything is paired: the same resample of rows for both models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, norm, t

from tunesmith.evaluate.metrics import Floats, Metric

HELD_AT_ONCE = 2**22  # of the numbers of a bootstrap's draws


@dataclass(frozen=True)
class Resamples:
    """`count` bootstrap resamples of n rows (Efron 1979), the same ones each time they are asked for."""

    n: int
    count: int
    seed: int

    def sums(self, stats: Floats) -> Floats:
        """The sum of rows' vectors [n, k] over each resample: [count, k], in bounded memory."""
        random = np.random.default_rng([self.seed, self.n])
        chunk = max(1, HELD_AT_ONCE // self.n)
        sizes = [min(chunk, self.count - start) for start in range(0, self.count, chunk)]
        even = np.full(self.n, 1 / self.n)
        return np.concatenate([random.multinomial(self.n, even, size=size) @ stats for size in sizes])


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
    if metric.binary:
        hits, rows = stats.sum(0)
        bounds = binomtest(round(hits), round(rows)).proportion_ci(method="wilson")
        low, high = float(bounds.low), float(bounds.high)
    else:
        low, high = _bounds(metric.value(draws.sums(stats)), len(stats))
    return {"value": value, "low": low, "high": high}


def difference(metric: Metric, baseline: Floats, tuned: Floats, draws: Resamples) -> dict[str, float]:
    """tuned - baseline on the same rows, with the paired bootstrap's 95% interval and two-sided p value.

    p is twice the smaller share of resamples on either side of no difference, counting the sample itself
    (Davison and Hinkley 1997, section 4.4), so it is never 0.
    """
    spread = metric.value(draws.sums(tuned)) - metric.value(draws.sums(baseline))
    spread = spread[np.isfinite(spread)]
    low, high = _bounds(spread, len(tuned))
    value = float(metric.value(tuned.sum(0)) - metric.value(baseline.sum(0)))
    widened = value + (spread - value) * expansion(len(tuned))
    below, above = (1 + np.sum(widened <= 0)) / (len(spread) + 1), (1 + np.sum(widened >= 0)) / (len(spread) + 1)
    return {"value": value, "low": low, "high": high, "p": float(min(1.0, 2 * min(below, above)))}


def verdict(metric: Metric, gap: dict[str, float]) -> str:
    """`better` or `worse` where the whole interval of the difference is on one side of zero, else `not_proven`."""
    low, high = (gap["low"], gap["high"]) if metric.higher_is_better else (-gap["high"], -gap["low"])
    return "better" if low > 0 else "worse" if high < 0 else "not_proven"
