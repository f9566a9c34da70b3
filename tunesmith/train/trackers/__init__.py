"""Other places that a run's figures go to, a file each. `metrics.jsonl` stays the truth.

A tracker is a Section with `open(name, folder, settings)`, which gives something with the three methods of `Log`. The
loop never waits for one: each has a thread of its own, and one that fails is left out for the rest of the run, with
one warning.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from tunesmith.errors import MachineError, first_line
from tunesmith.progress import say
from tunesmith.section import Section

PATIENCE = 30.0  # seconds that a run's end waits for a tracker


class Log(Protocol):
    """What a tracker does with a run."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Take in a step's figures."""

    def text(self, step: int, name: str, text: str) -> None:
        """Take in something to read: a finding, an answer."""

    def close(self, finished: bool) -> None:
        """The run is over: through, or stopped."""


class TrackerSection(Section):
    """The base of every tracker's settings."""

    package: ClassVar[str]
    """The module that must be there."""

    kind: str

    @abstractmethod
    def open(self, name: str, folder: Path, settings: dict[str, Any]) -> Log:
        """Begin to track the run of this name; `settings` are the recipe's `train`, flat."""

    def check(self) -> None:
        """Raise MachineError unless the tracker's package is there."""
        if importlib.util.find_spec(self.package) is None:
            raise MachineError(
                f"tracker {self.kind} needs {self.package}, which is not installed",
                where="train.trackers",
                fix=f"pip install 'tunesmith[{self.kind}]', or take it out of train.trackers.",
            )


class Trackers:
    """All trackers of a run, as one. Nothing here raises or waits (but `close`, for a while)."""

    def __init__(self, sections: Sequence[TrackerSection], name: str, folder: Path, settings: dict[str, Any]) -> None:
        self._workers = [_Worker(section, name, folder, settings) for section in sections]

    def numbers(self, step: int, line: dict[str, Any]) -> None:
        values = {name: float(v) for name, v in line.items() if isinstance(v, int | float) and name != "step"}
        for worker in self._workers:
            worker.put(lambda log: log.numbers(step, values))

    def text(self, step: int, name: str, text: str) -> None:
        for worker in self._workers:
            worker.put(lambda log: log.text(step, name, text))

    def close(self, finished: bool) -> None:
        for worker in self._workers:
            worker.put(lambda log: log.close(finished))
            worker.end()


class _Worker:
    """One tracker in a thread of its own."""

    def __init__(self, section: TrackerSection, name: str, folder: Path, settings: dict[str, Any]) -> None:
        self._kind = section.kind
        self._tasks: queue.Queue[Callable[[Log], None] | None] = queue.Queue()
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(section, name, folder, settings), daemon=True)
        self._thread.start()

    def put(self, task: Callable[[Log], None]) -> None:
        if not self._failed.is_set():
            self._tasks.put(task)

    def end(self) -> None:
        self._tasks.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            say(f"Tracker {self._kind} did not finish in {PATIENCE:.0f} s; going on without it")

    def _work(self, section: TrackerSection, name: str, folder: Path, settings: dict[str, Any]) -> None:
        try:
            log = section.open(name, folder, settings)
            while (task := self._tasks.get()) is not None:
                task(log)
        except BaseException as error:  # some clients end the process when they can't log in
            self._failed.set()
            say(f"Tracker {self._kind} failed and is left out ({type(error).__name__}: {first_line(error)})")


def flat(settings: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found
