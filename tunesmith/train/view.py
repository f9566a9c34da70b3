"""Training as a terminal shows it: one picture that is kept current; plain lines where it is not a terminal."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from tunesmith.progress import Bar, bar, console, say
from tunesmith.train.watch import Finding

if TYPE_CHECKING:
    from rich.console import Group

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE = 48  # steps, or groups of steps, that the loss's curve shows
FINDINGS_SHOWN = 3


class View(Protocol):
    """What is told of a run while it trains."""

    def step(self, line: dict[str, Any]) -> None: ...

    def finding(self, finding: Finding) -> None: ...


class Plain:
    """Lines, as often as a progress bar prints them."""

    def __init__(self, progress: Bar) -> None:
        self._bar = progress

    def step(self, line: dict[str, Any]) -> None:
        self._bar.advance(1, brief(line))

    def finding(self, finding: Finding) -> None:
        say(f"Noticed at {finding}")


class Live:
    """The run's figures, its loss as a curve, the time left, and the last findings."""

    def __init__(self, name: str, total: int, done: int, seconds: float) -> None:
        self._name, self._total, self._first, self._done = name, total, done, done
        self._expected, self._start = seconds, time.monotonic()
        self._line: dict[str, Any] = {}
        self._losses: list[float] = []
        self._validation: list[tuple[int, float]] = []
        self._findings: deque[Finding] = deque(maxlen=FINDINGS_SHOWN)

    def step(self, line: dict[str, Any]) -> None:
        self._line, self._done = line, line["step"]
        self._losses.append(line["loss"])
        if "validation_loss" in line:
            self._validation.append((line["step"], line["validation_loss"]))

    def finding(self, finding: Finding) -> None:
        self._findings.append(finding)

    @property
    def seconds_left(self) -> float:
        """By the rate so far; by what was expected until there is one."""
        taken = self._done - self._first
        left = self._total - self._done
        if taken < 3:
            return self._expected * left / max(self._total, 1)
        return (time.monotonic() - self._start) / taken * left

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2))
        share = self._done / self._total
        head.add_row(
            Text(f"Training {self._name}", style="bold"),
            ProgressBar(self._total, self._done, width=30),
            f"step {self._done:,} of {self._total:,} ({share:.0%})",
            f"{span(self.seconds_left)} left",
        )
        line, figures = self._line, Table.grid(padding=(0, 2))
        if line:
            pairs = [
                ("loss", f"{line['loss']:.4f}"),
                ("validation", f"{self._validation[-1][1]:.4f}" if self._validation else "-"),
                ("lowest", "{1:.4f} at step {0}".format(*min(self._validation, key=lambda v: v[1])))
                if self._validation
                else ("gradient", f"{line['grad_norm']:.3g}"),
                ("rate", f"{line['learning_rate']:.2e}"),
                ("tokens/s", f"{line['tokens_per_second']:,.0f}"),
                ("memory", f"{line['memory_bytes'] / 2**30:.2f} GiB"),
            ]
            figures.add_row(*(Text(name, style="dim") for name, _ in pairs))
            figures.add_row(*(value for _, value in pairs))
        parts: list[Any] = [head, figures, Text(curve(self._losses), style="cyan")]
        parts += [Text(f"! {finding}", style="yellow") for finding in self._findings]
        return Group(*parts)


@contextlib.contextmanager
def view(name: str, total: int, done: int, seconds: float) -> Iterator[View]:
    """Show a training while the block runs."""
    screen = console()
    if not screen.is_terminal:
        with bar("Training", total, done) as progress:
            yield Plain(progress)
        return
    import rich.live

    shown = Live(name, total, done, seconds)
    with rich.live.Live(shown, console=screen, refresh_per_second=4):
        yield shown


def brief(line: dict[str, Any]) -> str:
    """A step in a few words."""
    validated = f"  validation {line['validation_loss']:.3f}" if "validation_loss" in line else ""
    return f"loss {line['loss']:.3f}{validated}  {line['tokens_per_second']:.0f} tokens/s"


def curve(values: list[float]) -> str:
    """Values as a line of blocks, each the mean of as many as fit it."""
    if not values:
        return ""
    each = -(-len(values) // CURVE)
    means = [sum(values[i : i + each]) / len(values[i : i + each]) for i in range(0, len(values), each)]
    low, high = min(means), max(means)
    return "".join(BLOCKS[int((m - low) / (high - low or 1.0) * (len(BLOCKS) - 1))] for m in means)


def span(seconds: float) -> str:
    """A time that a person waits."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
