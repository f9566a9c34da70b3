"""The statistics, in simulation: intervals cover, p values are even, corrections hold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from tunesmith import plugins
from tunesmith.evaluate.metrics.base import Answers, rows
from tunesmith.evaluate.statistics import Resamples, compared, difference, holm, interval, quantile


@pytest.mark.long
def test_intervals_of_differences_cover_the_truth() -> None:
    """Between 93 and 97 of 100, for shares, means and ratios of sums (F1), with rows that are alike for both models."""
    random = np.random.default_rng(5)
    trials, n = 1000, 150
    accuracy, f1, mean = (plugins.load("metric", name) for name in ("accuracy", "json_field_f1", "rouge_l"))
    inside = dict.fromkeys(("share", "share gap", "mean gap", "f1"), 0)
    for trial in range(trials):
        draws = Resamples(n, 1000, trial)
        hard = random.random(n)
        one, other = (rows(list((hard + 0.3 * random.random(n) < p).astype(float))) for p in (0.4, 0.7))
        found = interval(accuracy, one, draws)
        inside["share"] += found["low"] <= 0.25 <= found["high"]  # P(hard + .3 u < .4)
        found = difference(accuracy, one, other, draws)
        inside["share gap"] += found["low"] <= 0.3 <= found["high"]
        common = random.normal(size=n)
        one, other = rows(list(common + random.exponential(1, n))), rows(list(common + random.exponential(1.2, n)))
        found = difference(mean, one, other, draws)
        inside["mean gap"] += found["low"] <= 0.2 <= found["high"]
        fields = random.poisson(3, n) + 1
        hits = random.binomial(fields, 0.8)
        found = interval(f1, np.stack([hits, fields - hits, fields - hits], 1).astype(float), draws)
        inside["f1"] += found["low"] <= 0.8 <= found["high"]
    for name, count in inside.items():
        assert 0.93 <= count / trials <= 0.97, (name, count / trials)


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


def test_quantiles_cover() -> None:
    random = np.random.default_rng(8)
    truth = scipy_stats.expon.ppf(0.9)
    inside = 0
    for _ in range(500):
        found = quantile(list(random.exponential(size=100)), 0.9)
        inside += found["low"] <= truth <= found["high"]
    assert 0.93 <= inside / 500 <= 0.98


def test_rounds_are_pooled_by_row() -> None:
    """Ten answers to each row are no ten times as many rows: the interval still covers between rows."""
    random = np.random.default_rng(9)
    accuracy, inside = plugins.load("metric", "accuracy"), 0
    for trial in range(400):
        chance = random.beta(0.5, 0.5, 60)
        hits = random.binomial(10, chance)
        stats = np.stack([hits, np.full(60, 10)], 1).astype(float)
        found = interval(accuracy, stats, Resamples(60, 400, trial))
        inside += found["low"] <= 0.5 <= found["high"]
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.long
@pytest.mark.parametrize("name", ["bleu", "chrf", "macro_f1"])
def test_intervals_of_corpus_metrics_cover(name: str) -> None:
    """What is no mean of rows: 150 rows drawn from 1,500, whose own value is the truth."""
    random = np.random.default_rng(0)
    size, n, trials = 1500, 150, 1000
    if name == "macro_f1":
        right = [f"label {x}" for x in random.choice(6, size, p=[0.4, 0.2, 0.15, 0.1, 0.1, 0.05])]
        given = [label if random.random() < 0.75 else f"label {random.integers(6)}" for label in right]
    else:
        words = [
            "a",
            "cat",
            "dog",
            "sat",
            "ran",
            "on",
            "mat",
            "red",
            "house",
            "tree",
            "river",
            "stone",
            "bird",
            "sings",
        ]
        texts = [list(random.choice(words, random.integers(5, 15))) for _ in range(size)]
        right = [" ".join(text) for text in texts]
        given = [" ".join(w if random.random() < 0.8 else random.choice(words) for w in text) for text in texts]
    metric = plugins.load("metric", name)
    every = metric.measure(Answers(given, right, [0.0] * size, [0] * size, [{}] * size))
    truth, inside = float(metric.value(every.sum(0))), 0
    for trial in range(trials):
        found = interval(metric, every[random.integers(0, size, n)], Resamples(n, 600, trial))
        inside += found["low"] <= truth <= found["high"]
    assert 0.93 <= inside / trials <= 0.97, inside / trials


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_quantiles_cover_exactly_what_the_docs_say(share: float) -> None:
    """By the binomial distribution of how many rows lie below the true quantile."""

    def covers(n: int) -> float:
        found = quantile(list(range(n)), share)
        return float(np.diff(scipy_stats.binom.cdf([found["low"], found["high"]], n, share))[0])

    if share == 0.95:
        assert {n: round(covers(n), 2) for n in (20, 32, 50, 60)} == {20: 0.63, 32: 0.79, 50: 0.91, 60: 0.94}
    assert all(0.93 <= covers(n) <= 0.995 for n in range(60, 400))
