"""How far judges agree beyond chance. The coefficients are functions of sums over items, so the one bootstrap gives
their intervals: items are drawn again, and with each all that was said of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.intervals import Floats, Resamples, Value, of_sums

RESAMPLES = 1000


def kappa(
    one: Sequence[str], other: Sequence[str], labels: Sequence[str], quadratic: bool = False, seed: int = 7
) -> dict[str, float] | None:
    """Cohen's kappa of two judges of the same items (Cohen 1960), as {value, low, high, n}.

    Args:
        labels: all that a judge can say, in order.
        quadratic: being off by two labels counts four times as much as by one (Cohen 1968).

    Returns:
        None where nothing could have differed: both said one and the same label of everything.
    """
    k = len(labels)
    place = {label: i for i, label in enumerate(labels)}
    tables = np.zeros((len(one), k * k))
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        tables[i, place[a] * k + place[b]] = 1
    off = np.subtract.outer(np.arange(k), np.arange(k))
    weights = off.astype(float) ** 2 if quadratic else (off != 0).astype(float)

    def value(sums: Floats) -> Floats:
        table = sums.reshape(*sums.shape[:-1], k, k)
        chance = table.sum(-1)[..., :, None] * table.sum(-2)[..., None, :] / table.sum((-1, -2))[..., None, None]
        return np.asarray(1 - (weights * table).sum((-1, -2)) / (weights * chance).sum((-1, -2)))

    return _spanned(value, tables, seed)


def fleiss(counts: Floats, seed: int = 7) -> dict[str, float] | None:
    """Fleiss' kappa of as many judges for each item, whoever they are (Fleiss 1971, equation 8), as {value, low, high,
    n}. `counts`: how often each label was given to each item [n, labels].

    Returns:
        None where one label was given to everything.
    """
    judges = float(counts[0].sum())
    agreeing = ((counts**2).sum(-1) - judges) / (judges * (judges - 1))

    def value(sums: Floats) -> Floats:
        said = sums[..., 1:].sum(-1)
        chance = ((sums[..., 1:] / said[..., None]) ** 2).sum(-1)
        return np.asarray((sums[..., 0] * judges / said - chance) / (1 - chance))

    return _spanned(value, np.column_stack([agreeing, counts]), seed)


def alpha(votes: Sequence[Sequence[str]], seed: int = 7) -> dict[str, float] | None:
    """Krippendorff's alpha for labels without an order (Krippendorff 2011), of any number of judges, each of whom may
    have judged some items only; as {value, low, high, n}. `votes`: what was said of each item.

    Returns:
        None where no item was judged twice, or nothing could have differed.
    """
    labels = sorted({label for of_item in votes for label in of_item})
    counts = np.array([[list(v).count(label) for label in labels] for v in votes if len(v) > 1], dtype=float)
    if not len(counts):
        return None
    judges = counts.sum(-1)
    differing = (counts * (judges[:, None] - counts)).sum(-1) / (judges - 1)

    def value(sums: Floats) -> Floats:
        observed, by_label = sums[..., 0], sums[..., 1:]
        n = by_label.sum(-1)
        return np.asarray(1 - observed * (n - 1) / (n**2 - (by_label**2).sum(-1)))

    return _spanned(value, np.column_stack([differing, counts]), seed)


def _spanned(value: Value, stats: Floats, seed: int) -> dict[str, float] | None:
    with np.errstate(invalid="ignore", divide="ignore"):  # in some resamples nothing could have differed
        if not len(stats) or not np.isfinite(value(stats.sum(0))):
            return None
        found = of_sums(value, stats, Resamples(len(stats), RESAMPLES, seed))
    return found | {"n": len(stats)}
