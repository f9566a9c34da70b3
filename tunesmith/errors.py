"""Every error that a user can meet. Each says what happened, where, and what to do about it.

TunesmithError
├── RecipeError      the recipe: an unknown key, a wrong type, a name that no plugin has
├── DataError        rows and files
├── ModelError       a base model, its tokenizer or template, an adapter
├── MachineError     disk, memory, or a library that is not installed
│   └── RankLost     another of the processes that train together has ended
├── RunError         a run's folder: taken, busy, missing, damaged
├── TrainingError    the loop had to stop: the loss is not finite
├── Held             the gate does not let a model through (exit code 3)
└── Interrupted      a person or the system asked us to stop (exit code 130)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TunesmithError(Exception):
    """What went wrong, where (a file and row, or a recipe key), and what to do."""

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"\n{self.fix}" if self.fix else ""
        return f"{place}{self.what}{advice}"

    def as_dict(self) -> dict[str, str | None]:
        return {"type": type(self).__name__, "what": self.what, "where": self.where, "fix": self.fix}


class RecipeError(TunesmithError):
    """The recipe can't be read, or says something that can't be meant."""


class DataError(TunesmithError):
    """A file or its rows can't be used."""


class ModelError(TunesmithError):
    """A model, tokenizer, template or adapter can't be used."""


class MachineError(TunesmithError):
    """This machine lacks room or a library."""


class RankLost(MachineError):
    """Another of the processes that train together has ended; that one knows why."""


class RunError(TunesmithError):
    """A run's folder is taken, busy, missing or damaged."""


class TrainingError(TunesmithError):
    """Training stopped because going on would have spoilt the model."""


class Held(TunesmithError):
    """The gate does not let a model through."""

    exit_code = 3


class Interrupted(TunesmithError):
    """Stopped on request, after saving."""

    exit_code = 130


def first_line(error: BaseException) -> str:
    """What another library's error says, without its pages of advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where a known name is close, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""
