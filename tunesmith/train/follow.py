"""Everything that looks on while a run trains: metrics, findings, the terminal. None of it changes a weight."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from tunesmith.runs import Run, append_jsonl, json_line, read_jsonl, write_text
from tunesmith.train.section import TrainSection
from tunesmith.train.trackers import Trackers, flat
from tunesmith.train.view import View, view
from tunesmith.train.watch import Finding, Watch


class Clock:
    """Where the time between two steps' ends goes, in seconds by name. What is clocked within something else is no
    longer that one's."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}
        self._busy = 0.0
        self._within = np.zeros(2)  # what the parts of what is being clocked took

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        start, around, self._within = _now(), self._within, np.zeros(2)
        try:
            yield
        finally:
            took = _now() - start
            seconds, busy = (took - self._within).tolist()
            self._within = around + took
            self._spent[what] = self._spent.get(what, 0.0) + seconds
            if what == "step":
                self._busy += busy

    def use(self) -> float | None:
        """The share of the device's time that it was at work in the step since the last lap; None if not known."""
        if torch.cuda.is_available():
            with contextlib.suppress(Exception):  # its library is optional
                return torch.cuda.utilization() / 100
            return None
        return round(min(self._busy / (self._spent["step"] * torch.get_num_threads()), 1.0), 3)

    def lap(self) -> dict[str, float]:
        """What was counted since the last lap. A checkpoint is counted to the step after it."""
        spent = {what: round(seconds, 4) for what, seconds in self._spent.items()}
        self._spent, self._busy = {}, 0.0
        return spent


def _now() -> np.ndarray:
    """Seconds [2]: of the clock on the wall, and of the cores' work."""
    return np.array([time.perf_counter(), time.process_time()])


class Follower:
    """Writes a step's line, looks at it, and shows it.

    Args:
        names: of the trained tensors, in the order in which their norms will come.
    """

    def __init__(self, run: Run, names: Sequence[str], shown: View, trackers: Trackers) -> None:
        self.run, self.shown, self.clock, self._trackers = run, shown, Clock(), trackers
        self._names, self._watch = list(names), Watch()
        self._norms: torch.Tensor | None = None
        self._moved = torch.zeros(len(self._names), dtype=torch.bool)
        for line in read_jsonl(run.metrics):  # what was told before an interruption is not told again
            self._watch.line(line)

    def step(self, line: dict[str, Any], norms: torch.Tensor, culprits: Callable[[], list[str]]) -> None:
        """Take in a step.

        Args:
            line: for metrics.jsonl; gets `seconds` and `use`, and `still` while some trained tensors have not moved.
            norms: of the trained tensors after the step.
            culprits: the names of the step's rows, those with the highest loss first.
        """
        norms = norms.detach().cpu()
        if self._norms is not None and not self._moved.all():
            self._moved |= norms != self._norms
            still = [name for name, moved in zip(self._names, self._moved.tolist(), strict=True) if not moved]
            if still:
                line["still"] = still
        self._norms = norms
        line["use"] = self.clock.use()
        line["seconds"] = self.clock.lap()
        append_jsonl(self.run.metrics, line)
        self._trackers.numbers(line["step"], line)
        self.shown.step(line)
        for finding in self._watch.line(line):
            rows = culprits() if finding.kind == "spike" else []
            self._tell(Finding(finding.kind, finding.step, finding.what, finding.fix, rows))

    def samples(self, told: Sequence[dict[str, Any]]) -> None:
        """Keep a validation's answers that are to be read: of each its `step`, `row`, `asked`, `reference` and
        `answer`."""
        for one in told:
            append_jsonl(self.run.samples, one)
        if told:
            self._trackers.text(told[0]["step"], "samples", "\n\n".join(map(_readable, told)))

    def _tell(self, finding: Finding) -> None:
        append_jsonl(self.run.findings, finding.as_dict())
        self.run.event("finding", finding=finding.as_dict())
        self.shown.finding(finding)
        self._trackers.text(finding.step, "finding", str(finding))


def _readable(sample: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {sample[name]}" for name in ("row", "asked", "reference", "answer"))


class Silent:
    """A follower that does nothing: the first rank follows for all."""

    def clock(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def step(self, *told: Any) -> None:
        pass

    samples = step


@contextlib.contextmanager
def following(
    run: Run, section: TrainSection, names: Sequence[str], total: int, done: int, seconds: float
) -> Iterator[Follower]:
    """A follower with the terminal's view and the trackers, while the block runs. `seconds`: what training is expected
    to take."""
    trackers = Trackers(section.trackers, run.name, run.path, flat(section.model_dump(mode="json")))
    finished = False
    try:
        with view(run.name, total, done, seconds) as shown:
            yield Follower(run, names, shown, trackers)
        finished = True
    finally:
        trackers.close(finished)


def forget_after(run: Run, step: int) -> None:
    """Drop what was noted of steps that a kill left without a checkpoint: they will be taken again."""
    for path in (run.metrics, run.findings, run.samples):
        if path == run.metrics or path.exists():
            write_text(path, "".join(json_line(row) for row in read_jsonl(path) if row["step"] <= step))
