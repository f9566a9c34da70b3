"""What intervals cover, in simulation: samples of populations whose own value is known, through the functions that
make scorecards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator
from scipy.stats import binom

from tunesmith import plugins
from tunesmith.agreement import alpha, fleiss, kappa
from tunesmith.conversation.message import Conversation, Message
from tunesmith.evaluate.memory import Memory
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, mean, measured, rows
from tunesmith.evaluate.people import Pair, strengths, summed_up
from tunesmith.evaluate.statistics import difference, interval, preference
from tunesmith.intervals import Resamples, between, quantile
from tunesmith.intervals import share as wilson

TRIALS, COUNT, POPULATION = 1000, 600, 6000
WORDS = ["a", "cat", "dog", "sat", "ran", "on", "mat", "red", "house", "tree", "river", "stone", "bird", "sings"]
SIX = (0.4, 0.2, 0.15, 0.1, 0.1, 0.05)  # how common six labels are
Trial = Callable[[Generator], dict[str, Any]]
Case = tuple[float, Trial]  # what is true, and a sample's score


def share(n: int, p: float) -> Case:
    draws = Resamples(n, COUNT, 1)
    metric = plugins.load("metric", "accuracy")
    return p, lambda random: interval(metric, rows(list((random.random(n) < p).astype(float))), draws)


def share_gap(n: int, only_one: float, only_other: float) -> Case:
    """Rows that one model alone has right, or the other."""
    draws, metric = Resamples(n, COUNT, 1), plugins.load("metric", "accuracy")

    def trial(random: Generator) -> dict[str, Any]:
        u = random.random(n)
        sides = [(u > 0.5) | (u < only_one), (u > 0.5) | ((u > only_one) & (u < only_one + only_other))]
        return difference(metric, rows(list(sides[1].astype(float))), rows(list(sides[0].astype(float))), draws)

    return only_one - only_other, trial


def ties(n: int, won: float, lost: float) -> Case:
    draws = Resamples(n, COUNT, 1)
    chances = [won, lost, 1 - won - lost]
    return (1 + won - lost) / 2, lambda random: preference(list(random.choice([1.0, 0.0, 0.5], n, p=chances)), draws)


def mean_gap(n: int, changed: float) -> Case:
    """Scores of which tuning changed a part."""
    draws, metric = Resamples(n, COUNT, 1), plugins.load("metric", "rouge_l")

    def trial(random: Generator) -> dict[str, Any]:
        before = random.beta(2, 2, n)
        after = np.where(random.random(n) < changed, random.beta(3, 2, n), before)
        return difference(metric, rows(list(before)), rows(list(after)), draws)

    return changed * 0.1, trial


def fields(n: int) -> Case:
    draws, metric = Resamples(n, COUNT, 1), plugins.load("metric", "json_field_f1")

    def trial(random: Generator) -> dict[str, Any]:
        there = random.poisson(3, n) + 1
        hits = random.binomial(there, 0.9)
        return interval(metric, np.stack([hits, there - hits, there - hits], 1).astype(float), draws)

    return 0.9, trial


def labels(chances: tuple[float, ...], *right: float) -> tuple[Metric, list[Floats]]:
    """Macro F1's vectors of a population, of models that get so many rows right; what one finds hard, so do others."""
    random = np.random.default_rng(0)
    known = [f"label {i}" for i in range(len(chances))]
    truth, hard = random.choice(known, POPULATION, p=chances), random.random(POPULATION)
    other, metric = random.choice(known, POPULATION), plugins.load("metric", "macro_f1")
    given = [np.where(0.85 * hard + 0.15 * random.random(POPULATION) < p, truth, other) for p in right]
    return metric, [metric.measure(answered(list(g), list(truth))) for g in given]


def answered(given: list[str], right: list[str]) -> Answers:
    n = len(given)
    return Answers(given, right, [0.0] * n, [0] * n, [{}] * n)


def macro_f1(n: int, chances: tuple[float, ...], right: float) -> Case:
    metric, [every] = labels(chances, right)
    return drawn_of(metric, every, n)


def macro_f1_gap(n: int, chances: tuple[float, ...], before: float, after: float) -> Case:
    metric, (one, other) = labels(chances, before, after)
    draws = Resamples(n, COUNT, 1)

    def trial(random: Generator) -> dict[str, Any]:
        places = random.integers(0, POPULATION, n)
        return difference(metric, one[places], other[places], draws)

    return float(metric.value(other.sum(0)) - metric.value(one.sum(0))), trial


def text(name: str, n: int, kept: float) -> Case:
    """Sentences of which a part of the words is kept."""
    random, metric = np.random.default_rng(0), plugins.load("metric", name)
    texts = [list(random.choice(WORDS, random.integers(5, 15))) for _ in range(POPULATION)]
    given = [" ".join(w if random.random() < kept else random.choice(WORDS) for w in words) for words in texts]
    return drawn_of(metric, metric.measure(answered(given, [" ".join(words) for words in texts])), n)


def drawn_of(metric: Metric, every: Floats, n: int) -> Case:
    draws = Resamples(n, COUNT, 1)
    truth = float(metric.value(every.sum(0)))
    return truth, lambda random: interval(metric, every[random.integers(0, POPULATION, n)], draws)


def two_judges(n: int, chances: tuple[float, ...], agreeing: float, quadratic: bool = False) -> Case:
    """Two who agree by rule on a part, and by chance on the rest: that part is kappa, whatever its weights."""
    known = [str(i) for i in range(len(chances))]

    def trial(random: Generator) -> dict[str, Any]:
        one, other = (random.choice(known, n, p=chances) for _ in range(2))
        other = np.where(random.random(n) < agreeing, one, other)
        return kappa(list(one), list(other), known, quadratic) or {}

    return agreeing, trial


def many_judges(n: int, chances: tuple[float, ...], sure: float, judges: int, way: str = "alpha") -> Case:
    """Judges who see the truth so often, and else guess as it is: two agree by rule as often as both see it."""
    known = [str(i) for i in range(len(chances))]

    def trial(random: Generator) -> dict[str, Any]:
        truth = random.choice(known, (n, 1), p=chances)
        said = np.where(random.random((n, judges)) < sure, truth, random.choice(known, (n, judges), p=chances))
        if way == "fleiss":
            return fleiss((said[:, :, None] == known).sum(1).astype(float)) or {}
        return alpha([list(of_item) for of_item in said]) or {}

    return sure**2, trial


def bradley_terry(n: int, strength: tuple[float, ...], tied: float) -> Case:
    """The last model's strength; a reviewer sees all pairs of each row."""
    k, names = len(strength), [f"m{i}" for i in range(len(strength))]
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    chance = {(i, j): 1 / (1 + np.exp(strength[j] - strength[i])) for i, j in pairs}
    wins = np.zeros((k, k))
    for (i, j), p in chance.items():
        wins[i, j], wins[j, i] = (1 - tied) * p + tied / 2, (1 - tied) * (1 - p) + tied / 2

    def trial(random: Generator) -> dict[str, Any]:
        judged = []
        for row in range(n):
            for i, j in pairs:
                better = "tie" if random.random() < tied else names[i if random.random() < chance[i, j] else j]
                judged.append(Pair(str(row), names[i], names[j], {"jo": better}))
        return dict(summed_up(judged, names, 300)["strength"][names[-1]])

    return float(strengths(wins.ravel() * 1e9, k)[-1]), trial


def rounds(n: int, seeds: int) -> Case:
    """Several answers to each row, of models with chances of their own for each: the row stays the unit."""
    draws, metric = Resamples(n, COUNT, 1), plugins.load("metric", "accuracy")

    def trial(random: Generator) -> dict[str, Any]:
        hits = random.binomial(seeds, random.beta(0.8, 0.4, n))
        return interval(metric, np.stack([hits, np.full(n, seeds)], 1).astype(float), draws)

    return 2 / 3, trial


def rounds_gap(n: int, seeds: int) -> Case:
    draws, metric = Resamples(n, COUNT, 1), plugins.load("metric", "accuracy")

    def trial(random: Generator) -> dict[str, Any]:
        chance = random.beta(0.5, 0.5, n)
        moved = np.where(random.random(n) < 0.6, random.beta(0.8, 0.4, n), chance)
        sides = (np.stack([random.binomial(seeds, p), np.full(n, seeds)], 1).astype(float) for p in (chance, moved))
        return difference(metric, *sides, draws)

    return 0.6 * (2 / 3 - 0.5), trial


def overfitting(n: int) -> Case:
    row = Conversation((Message("user", "a"), Message("assistant", "b")))
    probe = Memory([row] * (2 * n), [row] * n, 2 * n, COUNT, 1)

    def trial(random: Generator) -> dict[str, Any]:
        found = {
            side: {"seen": list(random.gamma(2, scale, 2 * n)), "unseen": list(random.gamma(2, 0.5, n)), "recited": []}
            for side, scale in (("baseline", 0.5), ("tuned", 0.3))
        }
        return dict(probe.compare(found)["memory"]["gap"]["tuned"])

    return 0.4, trial


def latency(n: int, part: float) -> Case:
    truth = float(-np.log(1 - part))
    return truth, lambda random: quantile(list(random.exponential(size=n)), part)


def latency_gap(n: int, part: float) -> Case:
    truth = float(-np.log(1 - part))

    def trial(random: Generator) -> dict[str, Any]:
        slow, fast = (quantile(list(scale * random.exponential(size=n)), part) for scale in (2, 1))
        return between(slow, fast)

    return truth, trial


def skewed(n: int) -> Case:
    draws = Resamples(n, COUNT, 1)
    metric = measured("loss", mean)
    return 1.0, lambda random: interval(metric, rows(list(random.exponential(size=n))), draws)


COVERED: dict[str, Callable[[], Case]] = {
    "share": lambda: share(150, 0.25),
    "share of few rows": lambda: share(40, 0.6),
    "share gap": lambda: share_gap(60, 0.3, 0.1),
    "share gap, rarely told apart": lambda: share_gap(150, 0.05, 0.02),
    "preference, judge or people": lambda: ties(40, 0.4, 0.25),
    "mean gap": lambda: mean_gap(60, 1.0),
    "mean gap, few rows changed": lambda: mean_gap(150, 0.3),
    "skewed mean": lambda: skewed(150),
    "field F1": lambda: fields(50),
    "macro F1": lambda: macro_f1(150, SIX, 0.8),
    "macro F1 of 60 rows": lambda: macro_f1(60, SIX, 0.8),
    "macro F1 of three labels": lambda: macro_f1(60, (0.4, 0.3, 0.3), 0.85),
    "macro F1 gap": lambda: macro_f1_gap(100, SIX, 0.6, 0.75),
    "BLEU": lambda: text("bleu", 150, 0.8),
    "BLEU of 60 rows": lambda: text("bleu", 60, 0.6),
    "chrF of 60 rows": lambda: text("chrf", 60, 0.8),
    "kappa": lambda: two_judges(40, (0.5, 0.5), 0.5),
    "kappa, one label common": lambda: two_judges(80, (0.75, 0.25), 0.6),
    "weighted kappa": lambda: two_judges(40, (0.1, 0.2, 0.3, 0.3, 0.1), 0.5, True),
    "alpha of two": lambda: many_judges(40, (0.4, 0.3, 0.3), 0.7, 2),
    "alpha of four": lambda: many_judges(30, (0.4, 0.3, 0.3), 0.7, 4),
    "Fleiss' kappa of three": lambda: many_judges(60, (0.4, 0.3, 0.3), 0.7, 3, "fleiss"),
    "Bradley-Terry of two": lambda: bradley_terry(40, (0.0, 0.8), 0.2),
    "Bradley-Terry of three": lambda: bradley_terry(30, (0.0, 0.8, -0.5), 0.2),
    "rounds": lambda: rounds(60, 3),
    "rounds gap": lambda: rounds_gap(60, 3),
    "overfitting gap": lambda: overfitting(50),
    "median": lambda: latency(30, 0.5),
    "p95": lambda: latency(100, 0.95),
    "p90 gap": lambda: latency_gap(100, 0.9),
}
QUICK = ("share", "share gap", "preference, judge or people", "mean gap", "field F1", "macro F1 of 60 rows", "rounds")
# Samples of which many hold too little: no case may claim a wrong interval often, though it would without `needs`.
TOO_SMALL: dict[str, Callable[[], Case]] = {
    "macro F1 without a mistake": lambda: macro_f1(30, (0.4, 0.3, 0.3), 0.9),
    "macro F1 gap": lambda: macro_f1_gap(40, (0.4, 0.3, 0.3), 0.9, 0.95),
    "mean gap, few rows changed": lambda: mean_gap(30, 0.1),
    "kappa, one label rare": lambda: two_judges(20, (0.9, 0.1), 0.6),
    "alpha, one label rare": lambda: many_judges(20, (0.9, 0.1), 0.8, 2),
    "Bradley-Terry, nearly always better": lambda: bradley_terry(20, (0.0, 4.0), 0.0),
    "p95": lambda: latency(30, 0.95),
}


def simulated(case: Case, trials: int) -> tuple[float, float]:
    """The share of samples whose interval holds the truth, and of those that claim one that does not."""
    truth, trial = case
    random = np.random.default_rng(5)
    found = [trial(random) for _ in range(trials)]
    inside = [bool(score) and score["low"] - 1e-9 <= truth <= score["high"] + 1e-9 for score in found]
    wrong = [bool(score) and not held and "needs" not in score for score, held in zip(found, inside, strict=True)]
    return float(np.mean(inside)), float(np.mean(wrong))


OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in COVERED if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *OTHERS])
def test_intervals_cover_the_truth(name: str) -> None:
    covered, _ = simulated(COVERED[name](), TRIALS)
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("n", [80, 150, 400])
def test_every_share_with_ten_hits_and_misses_is_covered(n: int) -> None:
    """Not drawn but summed over all counts that there can be."""
    bounds = [wilson(hits, n) for hits in range(n + 1)]
    for p in np.linspace(10 / n, 1 - 10 / n, 101):
        chances = binom.pmf(np.arange(n + 1), n, p)
        covered = sum(c for c, bound in zip(chances, bounds, strict=True) if bound["low"] <= p <= bound["high"])
        assert 0.93 <= covered <= 0.97, p


@pytest.mark.long
@pytest.mark.parametrize("name", TOO_SMALL)
def test_an_interval_that_few_rows_bear_on_says_so(name: str) -> None:
    covered, wrong = simulated(TOO_SMALL[name](), TRIALS // 2)
    assert wrong <= 0.07 and covered < 0.93
