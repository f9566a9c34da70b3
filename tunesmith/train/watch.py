"""What a person who watches a run would notice, from nothing but the lines of its metrics.

A line is a step: `loss`, `grad_norm`, `validation_loss` where one was taken, `seconds` by what they went to, and
`still`, the trained tensors that have not moved yet. Every rule compares the run with itself, so none needs to
know the model, the method or the data. The same lines always give the same findings.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

WINDOW = 20  # steps that a rule looks back on
SPIKES_TOLD = 5
# A step's loss is a spike where it lies so many robust standard deviations, and by so much, above those before it.
SPIKE_DEVIATIONS, SPIKE_RATIO = 6.0, 1.5
DIVERGED_RATIO, DIVERGED_NATS = 1.5, 0.2
TURNED_UP = 1.01  # validation loss above its lowest
NOISY = 0.75  # median change of the gradient's norm from step to step, over its median
VANISHED = 1e-3  # of the norm that the gradient began with, while the loss is still above half of what it began with
LOW_USE, LOW_SHARE = 0.5, 0.8  # of the device; of the time that goes into steps
ADVICE = {
    "data": "Laying out rows holds the steps up: take larger packs (train.pack_tokens), and see that the machine does "
    "not swap and no other program takes the cores.",
    "validation": "Validate less often (train.validate_every), or on fewer rows (data.split.validation).",
    "samples": "Answer fewer validation rows (train.samples, train.scored_rows), or validate less often.",
    "checkpoint": "Write checkpoints less often (train.checkpoint_every), or to a faster disk.",
}


@dataclass(frozen=True)
class Finding:
    """Something that a run's figures show.

    Attributes:
        kind: overfitting, divergence, spike, noisy_gradients, vanishing_gradients, dead_weights, low_use.
        step: the step at which it showed.
        what: the figures, as a sentence.
        fix: what to try.
        rows: for a spike, the rows of its step; those with the highest loss first.
    """

    kind: str
    step: int
    what: str
    fix: str
    rows: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = f" Rows: {', '.join(self.rows[:5])}{', ...' if len(self.rows) > 5 else ''}." if self.rows else ""
        return f"step {self.step}: {self.what}.{rows} {self.fix}"


class Watch:
    """Looks at a run line by line. Everything but a spike is told once."""

    def __init__(self) -> None:
        self._told: dict[str, int] = {}
        self._recent: deque[dict[str, Any]] = deque(maxlen=WINDOW)
        self._first: list[dict[str, Any]] = []  # the first lines
        self._lowest = math.inf  # of the medians of half a window
        self._validations: list[tuple[int, float, float]] = []  # step, its loss, the training loss around it

    def line(self, line: dict[str, Any]) -> list[Finding]:
        """What a step's line adds to what is known."""
        spike = self._spike(line)
        self._recent.append(line)
        if len(self._first) < WINDOW:
            self._first.append(line)
        found = [
            spike,
            self._diverged(line),
            self._overfitted(line),
            self._gradients(line),
            self._dead(line),
            self._used(line),
        ]
        new = [f for f in found if f and self._told.get(f.kind, 0) < (SPIKES_TOLD if f.kind == "spike" else 1)]
        for finding in new:
            self._told[finding.kind] = self._told.get(finding.kind, 0) + 1
        return new

    def _spike(self, line: dict[str, Any]) -> Finding | None:
        before = [row["loss"] for row in self._recent]
        if len(before) < WINDOW // 2:
            return None
        middle = statistics.median(before)
        # 1.4826 makes the median deviation of a normal distribution its standard deviation.
        spread = 1.4826 * statistics.median(abs(x - middle) for x in before)
        high = line["loss"] > middle + SPIKE_DEVIATIONS * spread and line["loss"] > SPIKE_RATIO * abs(middle) + 0.05
        if not high:
            return None
        return Finding(
            "spike",
            line["step"],
            f"the loss jumped to {line['loss']:.3f} from about {middle:.3f}",
            "Look at those rows: wrong answers, another language, text cut off. If they are right: a lower "
            "train.learning_rate, or a lower train.clip.",
        )

    def _diverged(self, line: dict[str, Any]) -> Finding | None:
        half = [row["loss"] for row in list(self._recent)[-(WINDOW // 2) :]]
        if len(half) < WINDOW // 2:
            return None
        now, lowest = statistics.median(half), self._lowest
        self._lowest = min(lowest, now)
        if not (now > DIVERGED_RATIO * lowest and now > lowest + DIVERGED_NATS):
            return None
        return Finding(
            "divergence",
            line["step"],
            f"the loss rose to about {now:.3f} after having been about {lowest:.3f}",
            "Halve train.learning_rate, or lengthen train.warmup; the best weights so far are kept (train.keep_best).",
        )

    def _overfitted(self, line: dict[str, Any]) -> Finding | None:
        if "validation_loss" not in line:
            return None
        near = statistics.fmean(row["loss"] for row in list(self._recent)[-(WINDOW // 2) :])
        self._validations.append((line["step"], line["validation_loss"], near))
        step, lowest, then = min(self._validations, key=lambda v: v[1])
        since = [v for v in self._validations if v[0] > step]
        if len(since) < 2 or any(loss < TURNED_UP * lowest for _, loss, _ in since[-2:]) or near >= then:
            return None
        return Finding(
            "overfitting",
            line["step"],
            f"validation loss turned up, from {lowest:.3f} at step {step} to {line['validation_loss']:.3f}, while the "
            f"training loss fell on from {then:.3f} to {near:.3f}",
            f"Stop near step {step} (fewer train.epochs, or train.early_stopping: 2); then more rows, a smaller "
            "adapter rank, dropout or weight decay.",
        )

    def _gradients(self, line: dict[str, Any]) -> Finding | None:
        if len(self._recent) < WINDOW:
            return None
        now = sorted(row["grad_norm"] for row in self._recent)
        middle, first = statistics.median(now), statistics.median(row["grad_norm"] for row in self._first)
        losses = [statistics.median(row["loss"] for row in rows) for rows in (self._recent, self._first)]
        if middle < VANISHED * first and losses[0] > 0.5 * losses[1]:
            return Finding(
                "vanishing_gradients",
                line["step"],
                f"the gradient's norm is about {middle:.2g}, it began at about {first:.2g}, and the loss is still "
                f"{losses[0]:.3f}",
                "A higher train.learning_rate or a longer train.warmup; float32 (train.precision) if the base is "
                "bfloat16.",
            )
        norms = [row["grad_norm"] for row in self._recent]
        if statistics.median(abs(b - a) for a, b in pairwise(norms)) > NOISY * middle:
            low, high = now[len(now) // 10], now[-1 - len(now) // 10]
            return Finding(
                "noisy_gradients",
                line["step"],
                f"the gradient's norm swings between {low:.2g} and {high:.2g} (its median is {middle:.2g})",
                "A larger train.batch_size steadies it; else a lower train.learning_rate or train.clip.",
            )
        return None

    def _dead(self, line: dict[str, Any]) -> Finding | None:
        still = line.get("still", [])
        if not still or len(self._recent) < WINDOW or not self._recent[0].get("still"):
            return None
        shown = ", ".join(still[:3]) + (", ..." if len(still) > 3 else "")
        return Finding(
            "dead_weights",
            line["step"],
            f"{len(still)} trained tensors have not moved at all: {shown}",
            "Nothing reaches them: leave those layers out of train.adapter.targets, or check that the rows use them "
            "(experts, new tokens); if all stand still, train.learning_rate is too small.",
        )

    def _used(self, line: dict[str, Any]) -> Finding | None:
        timed = [row["seconds"] for row in self._recent if "seconds" in row]
        if len(timed) < WINDOW:
            return None
        spent: dict[str, float] = {}
        for seconds in timed:
            for what, took in seconds.items():
                spent[what] = spent.get(what, 0.0) + took
        whole, step = sum(spent.values()), spent.get("step", 0.0)
        other = max((w for w in spent if w != "step"), key=lambda w: spent[w], default=None)
        if other and step < LOW_SHARE * whole and spent[other] > (1 - LOW_SHARE) / 2 * whole:
            return Finding(
                "low_use",
                line["step"],
                f"only {step / whole:.0%} of the time goes into steps, {spent[other] / whole:.0%} into {other}",
                ADVICE.get(other, ""),
            )
        uses = [row["use"] for row in self._recent if row.get("use") is not None]
        if len(uses) == WINDOW and statistics.median(uses) < LOW_USE and step > 0.05 * WINDOW:
            return Finding(
                "low_use",
                line["step"],
                f"the device is at work for only {statistics.median(uses):.0%} of a step",
                "Give a step more to do at once (train.pack_tokens, train.batch_size); see that no other program "
                "takes the cores.",
            )
        return None


def review(lines: Sequence[dict[str, Any]]) -> list[Finding]:
    """All findings in the lines of a whole run."""
    watch = Watch()
    return [finding for line in lines for finding in watch.line(line)]
