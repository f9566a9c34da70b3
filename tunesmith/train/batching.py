"""Which rows make which step. Everything follows from the seed and the step's number, so that a run can go
on from any step without having lived through the ones before."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Schedule:
    """The rows of every optimizer step.

    Attributes:
        rows: how many training rows there are.
        batch_size: rows in a step; an epoch's last step takes what is left.
        total: optimizer steps in the run.
    """

    rows: int
    batch_size: int
    total: int
    seed: int

    @classmethod
    def of(cls, rows: int, batch_size: int, epochs: float, max_steps: int | None, seed: int) -> Schedule:
        an_epoch = math.ceil(rows / batch_size)
        total = max(1, round(an_epoch * epochs))
        return cls(rows, batch_size, total if max_steps is None else min(total, max_steps), seed)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.batch_size)

    def step(self, number: int) -> list[int]:
        """The rows of a step (counted from 0), in a new random order each epoch."""
        epoch, within = divmod(number, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        return [int(i) for i in order[within * self.batch_size : (within + 1) * self.batch_size]]


def learning_rate(step: int, total: int, peak: float, warmup: float, schedule: str, decay: float = 0.2) -> float:
    """The rate of a step (counted from 0): a straight rise over the warm-up, then down to zero."""
    rise = math.ceil(total * warmup)
    if step < rise:
        return peak * (step + 1) / rise
    if schedule == "constant":
        return peak
    if schedule == "wsd":
        return peak * min(1.0, (total - step) / math.ceil(total * decay))
    left = (total - step) / max(total - rise, 1)
    return peak * (left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))
