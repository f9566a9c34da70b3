"""Progress bars with the time left, on standard error; plain lines where it is not a terminal."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

QUIET_LINES_EVERY = 10.0


class Bar:
    """A wait that can be seen. `total` is in whatever unit `advance` counts; None where it is unknown."""

    def __init__(self, title: str, total: float | None, report: Callable[[float, str], None]) -> None:
        self.title, self.total, self.done, self._report = title, total, 0.0, report

    def advance(self, by: float = 1, note: str = "") -> None:
        self.done += by
        self._report(self.done, note)


@contextlib.contextmanager
def bar(title: str, total: float | None = None, done: float = 0) -> Iterator[Bar]:
    """Show a progress bar while the block runs."""
    screen = console()
    if not screen.is_terminal:
        with _lines(screen, title, total, done) as plain:
            yield plain
        return
    from rich.progress import (
        BarColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=screen, transient=False) as progress:
        task = progress.add_task(title, total=total, note="")
        progress.update(task, completed=done)
        shown = Bar(title, total, lambda now, note: progress.update(task, completed=now, note=note))
        shown.done = done
        yield shown


@contextlib.contextmanager
def clock(title: str, seconds: float) -> Iterator[None]:
    """A bar that moves with time, for a wait of a known length that nothing counts."""
    through = threading.Event()
    with bar(title, seconds) as shown:

        def tick() -> None:
            while not through.wait(0.5):
                shown.advance(min(0.5, max(seconds - shown.done, 0)))

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield
        finally:
            through.set()
            ticker.join()


@contextlib.contextmanager
def _lines(screen: Console, title: str, total: float | None, done: float) -> Iterator[Bar]:
    start = last = time.monotonic()
    first = done

    def report(now: float, note: str) -> None:
        nonlocal last
        clock = time.monotonic()
        if clock - last < QUIET_LINES_EVERY or not total:
            return
        last = clock
        left = (clock - start) / max(now - first, 1e-9) * (total - now)
        screen.print(f"{title}: {now / total:.0%}, {left:.0f} s left {note}", markup=False, highlight=False)

    plain = Bar(title, total, report)
    plain.done = done
    yield plain
    took = time.monotonic() - start
    if took > 2:
        screen.print(f"{title}: done in {took:.0f} s", markup=False, highlight=False)


def say(text: str) -> None:
    """A line for the person who waits (standard error, so that standard output stays for results)."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)


_console: Console | None = None


def console() -> Console:
    global _console
    if _console is None:
        from rich.console import Console

        _console = Console(stderr=True, emoji=False)
    return _console


def quiet() -> None:
    """Say nothing from here on (`--json`)."""
    global _console
    import io

    from rich.console import Console

    _console = Console(file=io.StringIO(), force_terminal=False, emoji=False)
