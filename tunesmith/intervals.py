"""95% intervals: of shares, of differences of shares, of quantiles, and by bootstrap of any function of rows' sums.

Each is {low, high}, with `needs` where so few rows bear on it that it is no proof: about how many it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, binomtest, norm, t

Floats = NDArray[np.float64]
Value = Callable[[Floats], Floats]  # sums over rows [..., k] -> [...]
HELD_AT_ONCE = 2**22  # of the numbers of a bootstrap's draws
REACH = float(norm.ppf(0.975))
FEWEST = 5  # rows that must bear on a bootstrap's interval


@dataclass(frozen=True)
class Resamples:
    """`count` bootstrap resamples of n rows (Efron 1979), the same ones each time they are asked for."""

    n: int
    count: int
    seed: int

    def sums(self, stats: Floats) -> Floats:
        """The sum of rows' vectors [n, k] over each resample: [count, k], in bounded memory."""
        return np.concatenate([times @ stats for times in self._times()])

    def swaps(self, stats: Floats) -> Floats:
        """The sum of a random half of the rows' vectors [n, k], `count` times: [count, k]."""
        random = np.random.default_rng([self.seed, self.n, 1])
        return np.concatenate([random.integers(0, 2, (size, self.n)).astype(float) @ stats for size in self._sizes()])

    def _times(self) -> Iterable[Floats]:
        """How often each resample has each row, [size, n] at once; kept where it is one piece."""
        return self._kept if len(self._sizes()) == 1 else self._drawn()

    @cached_property
    def _kept(self) -> list[Floats]:
        return list(self._drawn())

    def _drawn(self) -> Iterator[Floats]:
        random = np.random.default_rng([self.seed, self.n])
        even = np.full(self.n, 1 / self.n)
        for size in self._sizes():
            yield random.multinomial(self.n, even, size=size).astype(float)

    def _sizes(self) -> list[int]:
        chunk = max(1, HELD_AT_ONCE // self.n)
        return [min(chunk, self.count - start) for start in range(0, self.count, chunk)]


def expansion(n: int, freedom: float) -> float:
    """By how much a bootstrap's spread around its value is too narrow for n rows (Hesterberg 2015, section 3.4):
    a resample varies by (n - 1) / n too little, and normal quantiles stand where Student's belong."""
    return float(np.sqrt(n / (n - 1)) * t.ppf(0.975, freedom) / REACH) if n > 1 else 1.0


def of_sums(value: Value, stats: Floats, draws: Resamples) -> dict[str, float]:
    """A function of rows' sums with its bootstrap interval. `stats` is [n, k], `draws` the resamples."""
    whole = float(value(stats.sum(0)))
    return {"value": whole} | bootstrap(whole, value(draws.sums(stats)), pulls(value, stats), len(stats))


def pulls(value: Value, stats: Floats) -> Floats:
    """How far each of n rows pulls a value (the jackknife: with it, less without it), about their mean: [n]."""
    total, chunk = stats.sum(0), max(1, HELD_AT_ONCE // stats.shape[1])
    found = value(total) - np.concatenate([value(total - stats[i : i + chunk]) for i in range(0, len(stats), chunk)])
    found = np.where(np.isfinite(found), found, 0.0)
    return np.asarray(found - found.mean())


def bootstrap(value: float, spread: Floats, pulled: Floats, n: int) -> dict[str, float]:
    """The bias-corrected and accelerated interval (BCa: Efron 1987; Efron and Tibshirani 1993, equations 14.9 to
    14.15), with the expansion that n rows call for.

    Its ends are those quantiles of the bootstrap's values that allow for a value that resamples lie to one side of, and
    for one whose error grows with it. A variance's own variance is kurtosis - 1 over n, of which skewness^2 goes with
    the value (Cramér 1946, section 27.4) and is allowed for; for the rest, degrees of freedom (Satterthwaite 1946).

    Rows that do not differ tell nothing of those that would: FEWEST must bear on the value, counted as n over the
    kurtosis of their pulls. A share with m hits has m such rows, normal values n / 3.

    Args:
        pulled: see `pulls`; of several samples, one after the other (Davison and Hinkley 1997, section 5.3.2).
        n: rows, of several samples the fewest.
    """
    spread, size = spread[np.isfinite(spread)], float(np.sum(pulled**2))
    if not len(spread) or not size > 1e-24 * max(1.0, value**2):  # what is left is rounding
        return {"low": value, "high": value, "needs": FEWEST * (n + 1)}
    below = np.mean(spread < value) + np.mean(spread == value) / 2
    aside = norm.ppf(np.clip(below, 1 / len(spread), 1 - 1 / len(spread)))
    kurtosis = len(pulled) * float(np.sum(pulled**4)) / size**2
    skewness = math.sqrt(len(pulled)) * float(np.sum(pulled**3)) / size**1.5
    freedom = max(1.0, min(n - 1, 2 * len(pulled) / max(kurtosis - 1 - skewness**2, 1e-9)))
    ends = aside + np.array([-REACH, REACH]) * expansion(n, freedom)
    growth = skewness / (6 * math.sqrt(len(pulled)))
    low, high = np.quantile(spread, norm.cdf(aside + ends / np.maximum(1 - growth * ends, 1e-9)))
    enough = math.ceil(FEWEST * kurtosis - 1e-9)  # rows, at this kurtosis
    needs = {"needs": enough} if len(pulled) < enough else {}
    return {"low": min(float(low), value), "high": max(float(high), value)} | needs


def share(hits: int, n: int) -> dict[str, float]:
    """The bounds of a share's score interval (Wilson 1927)."""
    bounds = binomtest(hits, n).proportion_ci(method="wilson")
    return {"low": float(bounds.low), "high": float(bounds.high)}


def paired_shares(won: int, lost: int, n: int) -> dict[str, float]:
    """The bounds of a difference of two shares of the same n rows: the score interval (Tango 1998, section 3).

    Args:
        won: rows that only the first has; `lost`: that only the second has.
    """

    def score(gap: float) -> float:
        """How many standard errors `won` less `lost` lies above what a true difference of `gap` makes likely; the
        rows lost are at their likeliest share under it."""
        linear = (2 * n - won + lost) * gap - won - lost
        rare = (math.sqrt(max(0.0, linear**2 + 8 * n * lost * gap * (1 - gap))) - linear) / (4 * n)
        variance = n * (2 * rare + gap * (1 - gap))
        return (won - lost - n * gap) / math.sqrt(max(variance, 1e-12))

    gap, edge = (won - lost) / n, 1 - 1e-9
    low = brentq(lambda x: score(x) - REACH, -edge, gap) if gap > -edge and score(-edge) > REACH else -1.0
    high = brentq(lambda x: score(x) + REACH, gap, edge) if gap < edge and score(edge) < -REACH else 1.0
    return {"low": float(low), "high": float(high)}


def quantile(values: Sequence[float], part: float) -> dict[str, float]:
    """A quantile with its interval from order statistics (David and Nagaraja 2003, section 7.1), its ends between two
    of them (Nyblom 1992), so that what it covers does not go in steps.

    Where there are so few values that none of them bounds it from above, the greatest stands there, and `needs` says
    how many it takes.
    """
    ordered, n = np.sort(np.asarray(values, dtype=np.float64)), len(values)
    value = float(np.quantile(ordered, part))
    low, high = _order(ordered, part), -_order(-ordered[::-1], 1 - part)
    found = {"value": value, "low": min(low, value), "high": max(high, value)}
    return found if part**n <= 0.025 else found | {"needs": math.ceil(math.log(0.025) / math.log(part))}


def _order(ordered: Floats, part: float) -> float:
    """What a quantile lies above with 97.5% confidence; the least value where none does."""
    n = len(ordered)
    rank = int(binom.ppf(0.025, n, part))  # the chance that fewer lie below the quantile is at most 2.5%
    if rank == 0 or n < 2:
        return float(ordered[0])
    under, over = binom.cdf([rank - 1, rank], n, part)
    odds = rank * (1 - part) * (over - 0.025) / ((n - rank) * part * max(0.025 - under, 1e-12)) if rank < n else 0.0
    next_one = 1 / (1 + odds)
    return float((1 - next_one) * ordered[rank - 1] + next_one * ordered[min(rank, n - 1)])


def between(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """The difference `one` - `other` of two figures from their own intervals, as if they were independent (square and
    add: Newcombe 1998; Zou and Donner 2008, equation 5)."""
    gap = one["value"] - other["value"]
    down = math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    up = math.hypot(one["high"] - one["value"], other["value"] - other["low"])
    needs = [part["needs"] for part in (one, other) if "needs" in part]
    return {"value": gap, "low": gap - down, "high": gap + up} | ({"needs": max(needs)} if needs else {})
