"""What a cleaning step is: it looks at rows and says of each what becomes of it.

Most steps look at a row alone (`RowStep`): their `look` is a pure function of the row, so rows can be looked at in
any order and anywhere. The others compare rows with one another; what they compare is made from each row alone, and
only what shares a key is brought together (`minhash.py`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.texts import map_texts
from tunesmith.data.engines.engine import Running
from tunesmith.data.engines.local import LocalRunning
from tunesmith.screen import library
from tunesmith.section import Section


@dataclass(frozen=True)
class Verdict:
    """What a step makes of one row.

    Attributes:
        row: the row, as it was or changed; None to remove it.
        why: what was changed, or why it is removed; for a row that is as it was, why a person should look at it.
        found: what was found in it, counted by kind.
    """

    row: Conversation | None
    why: str = ""
    found: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Around:
    """What a step may know besides the rows: where paths begin, the seed, the rows held out so far, who works for it,
    and a folder for files that are needed for a while (a new one if not given)."""

    folder: Path = Path()
    seed: int = 0
    held: Mapping[str, Sequence[Conversation]] = field(default_factory=dict)
    engine: Running = field(default_factory=LocalRunning)
    scratch: Path | None = None


class Step(Section):
    """A cleaning step: what a key under `data.clean` stands for."""

    short: ClassVar[str | None] = None
    """The key that a plain value sets, as in `language: [en]`."""
    after_split: ClassVar[bool] = False
    """Runs on the training rows once the others are held out."""

    @abstractmethod
    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterable[Verdict | None]:
        """A verdict for each row, in the rows' order; None for one that stays as it is, with nothing to tell of it.

        The rows may lie on disk: go through them as often as it takes, and keep little of each.
        """

    def hide(self, text: str) -> str:
        """The text as it may be written beside the rows: without what this step takes out of them."""
        return text

    def files(self, folder: Path) -> list[Path]:
        """Files whose content the result depends on."""
        return []

    @property
    def note(self) -> str:
        """What the report says of the step itself, in a sentence."""
        return ""

    def tell(self, rows: Sequence[Conversation], removed: Iterable[tuple[str, str]]) -> dict[str, Any]:
        """What the report shows besides the counts: tables by name, each a list of rows as mappings.

        Args:
            rows: those of one part that were looked at; there are some.
            removed: of each that was removed, its id and why.
        """
        return {}


class RowStep(Step):
    """A step that looks at each row alone."""

    @abstractmethod
    def look(self, row: Conversation) -> Verdict:
        """The verdict on a row: the same whenever and wherever it is asked for."""

    def looks(self, rows: Sequence[Conversation]) -> Iterable[Verdict]:
        """The verdicts on some rows, for a step that is quicker with several at a time."""
        return map(self.look, rows)

    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterable[Verdict | None]:
        return self.looks(rows)


class MendStep(RowStep):
    """A step that mends each text of a row by itself."""

    @abstractmethod
    def mend(self, text: str) -> str:
        """A text, mended; the text itself where nothing is wrong."""

    def look(self, row: Conversation) -> Verdict:
        mended = map_texts(row, self.mend)
        return Verdict(row) if mended is row else Verdict(mended, "mended", {"mended": 1})


def need(module: str, step: str, extra: str = "data") -> Any:
    """A library that a step needs, which comes with an extra.

    Raises:
        MachineError: it is not installed; names the extra.
    """
    return library.need(module, f"data.clean.{step}", extra)
