"""`data.clean.toxicity`: foul language and insults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import RowStep, Verdict
from tunesmith.data.clean.texts import SIDES, texts
from tunesmith.screen.offence import offence


class Toxicity(RowStep):
    """Find rows with a text that a classifier takes for offensive: the linear one that alt-profanity-check ships, or
    any of the hub by its name."""

    short: ClassVar[str] = "above"

    above: float = Field(0.9, gt=0, lt=1)
    """How probable it must be."""
    action: Literal["report", "drop"] = "drop"
    """Leave such rows out, or list them for a person."""
    on: Literal["prompt", "answer", "both"] = "both"
    """Whose texts are judged. What users say may be worth keeping where the model shall learn to answer it."""
    model: str | None = None
    """A text classifier: a folder or a hub name. If not given, the one that ships (English)."""
    labels: tuple[str, ...] = ()
    """The classifier's labels that count, whatever their case. If not given, all whose name says toxic, obscene,
    insult, threat, hate or offensive."""

    @field_validator("labels", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def look(self, row: Conversation) -> Verdict:
        return self.looks([row])[0]

    def looks(self, rows: Sequence[Conversation]) -> list[Verdict]:
        said = [(i, text) for i, row in enumerate(rows) for text in texts(row, SIDES[self.on]) if text.strip()]
        worst = [0.0] * len(rows)
        for (i, _), score in zip(said, self.scores([text for _, text in said]) if said else (), strict=True):
            worst[i] = max(worst[i], score)
        return list(map(self._verdict, rows, worst))

    def scores(self, batch: Sequence[str]) -> list[float]:
        """For each text, how probable it is that it offends."""
        return offence(batch, self.model, self.labels, "data.clean.toxicity")

    def _verdict(self, row: Conversation, score: float) -> Verdict:
        found = {"none (below 0.5)" if score < 0.5 else f"{int(score * 10) / 10:.1f} and more": 1}
        if score <= self.above:
            return Verdict(row, "", found)
        return Verdict(row if self.action == "report" else None, f"offends (p = {score:.2f})", found)
