"""The statistics: p values are even, corrections hold, intervals end where others' do. Coverage: test_coverage.py."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

from tunesmith import plugins
from tunesmith.evaluate.metrics.base import mean, rows
from tunesmith.evaluate.statistics import compared, difference, holm, verdict
from tunesmith.intervals import Resamples, of_sums, paired_shares


def test_permutation_p_values_are_even_and_agree_with_scipy() -> None:
    random = np.random.default_rng(6)
    mean = plugins.load("metric", "rouge_l")
    found = []
    for trial in range(600):
        one, other = (random.normal(size=60) for _ in range(2))
        found.append(difference(mean, rows(list(one)), rows(list(other)), Resamples(60, 400, trial))["p"])
    assert scipy_stats.kstest(found, "uniform").pvalue > 0.01
    one, other = random.normal(size=40), random.normal(0.4, 1, size=40)
    expected = scipy_stats.permutation_test(
        (other, one), lambda a, b, axis: (a - b).mean(axis=axis), permutation_type="samples", vectorized=True,
        n_resamples=9999, rng=1,
    ).pvalue  # fmt: skip
    p = difference(mean, rows(list(one)), rows(list(other)), Resamples(40, 9999, 0))["p"]
    assert p == pytest.approx(expected, abs=0.01)


def test_mcnemar_holm_and_the_smallest_difference() -> None:
    accuracy = plugins.load("metric", "accuracy")
    one = rows([1.0] * 50 + [0.0] * 50)
    other = rows([1.0] * 45 + [0.0] * 5 + [1.0] * 15 + [0.0] * 35)
    found = difference(accuracy, one, other, Resamples(100, 2000, 0))
    assert found["mcnemar"] == pytest.approx(scipy_stats.binomtest(5, 20).pvalue)
    error = np.std([0] * 80 + [1] * 15 + [-1] * 5) / 10
    assert found["smallest"] == pytest.approx(2.8016 * error, rel=0.1)

    scores = {name: {"difference": {"p": p}} for name, p in (("a", 0.01), ("b", 0.04), ("c", 0.03), ("d", 0.005))}
    holm(scores)
    assert [scores[n]["difference"]["p_holm"] for n in "abcd"] == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_the_smallest_difference_is_found_four_times_in_five() -> None:
    random = np.random.default_rng(7)
    mean, n = plugins.load("metric", "rouge_l"), 80
    shown = 0
    for trial in range(300):
        noise = random.normal(size=n)
        size = compared(mean, {"baseline": rows([0.0] * n), "tuned": rows(list(noise))}, 300, trial)["difference"][
            "smallest"
        ]
        fresh = random.normal(size=n) + size
        found = difference(mean, rows([0.0] * n), rows(list(fresh)), Resamples(n, 300, trial))
        shown += found["low"] > 0
    assert 0.72 <= shown / 300 <= 0.88


def test_the_bootstrap_is_scipys() -> None:
    """BCa of the mean of 500 skewed rows; what ours adds for few rows is nothing there."""
    values = np.random.default_rng(11).exponential(size=500)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=3).confidence_interval
    ours = of_sums(mean, rows(list(values)), Resamples(500, 20_000, 3))
    assert (ours["low"], ours["high"]) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert ours["high"] - ours["value"] > 1.02 * (ours["value"] - ours["low"])  # no symmetric interval would do


@pytest.mark.parametrize(("won", "lost", "n"), [(12, 3, 60), (3, 12, 60), (4, 0, 40), (1, 1, 25), (20, 5, 25)])
def test_a_difference_of_shares_ends_where_its_score_test_does(won: int, lost: int, n: int) -> None:
    """Against a likelihood that is maximised by scipy, not solved."""
    found = paired_shares(won, lost, n)
    for gap in found.values():

        def unlikely(rare: float, gap: float = gap) -> float:
            parts = ((won, rare + gap), (lost, rare), (n - won - lost, 1 - 2 * rare - gap))
            return -sum(count * np.log(max(p, 1e-300)) for count, p in parts if count)

        least, most = max(0.0, -gap), (1 - gap) / 2
        rare = optimize.minimize_scalar(unlikely, bounds=(least, most), method="bounded", options={"xatol": 1e-10}).x
        score = (won - lost - n * gap) / np.sqrt(n * (2 * rare + gap * (1 - gap)))
        assert abs(score) == pytest.approx(1.96, abs=0.01)
    assert found["low"] < (won - lost) / n < found["high"]


def test_rows_that_do_not_differ_prove_little() -> None:
    none = rows([0.0] * 40)
    accuracy, rouge = (plugins.load("metric", name) for name in ("accuracy", "rouge_l"))
    draws = Resamples(40, 500, 0)
    found = difference(accuracy, none, none, draws)
    assert found["low"] == pytest.approx(-found["high"]) and 0.08 < found["high"] < 0.1  # z^2 / (n + z^2)
    found = difference(rouge, none, none, draws)
    assert found["needs"] == 205 and verdict(rouge, found) == "not_proven"
    some = rows([0.5] * 4 + [0.0] * 36)
    found = difference(rouge, none, some, draws)
    assert found["low"] > 0 and found["needs"] > 40 and verdict(rouge, found) == "not_proven"
    found = difference(rouge, none, rows([0.5] * 40), draws)  # no row differs from the others, but all do from zero
    assert found["needs"] == 205 and verdict(rouge, found) == "better"
    found = difference(rouge, none, rows([0.5] * 6 + [0.0] * 34), draws)
    assert "needs" not in found and verdict(rouge, found) == "better"
