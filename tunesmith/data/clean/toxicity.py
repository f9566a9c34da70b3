"""`data.clean.toxicity`: foul language and insults."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import Around, Step, Verdict, need
from tunesmith.data.clean.texts import SIDES, texts
from tunesmith.errors import ModelError, first_line
from tunesmith.progress import bar

CHUNK = 512


class Toxicity(Step):
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

    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterator[Verdict | None]:
        with bar("Judging texts", len(rows)) as progress:
            for start in range(0, len(rows), CHUNK):
                some = list(rows[start : start + CHUNK])
                said = [(i, text) for i, row in enumerate(some) for text in texts(row, SIDES[self.on]) if text.strip()]
                worst = [0.0] * len(some)
                for (i, _), score in zip(said, self.scores([text for _, text in said]) if said else (), strict=True):
                    worst[i] = max(worst[i], score)
                yield from map(self._verdict, some, worst)
                progress.advance(len(some))

    def scores(self, batch: Sequence[str]) -> list[float]:
        """For each text, how probable it is that it offends."""
        if self.model is not None:
            return _by_model(self.model, self.labels)(batch)
        return [float(p) for p in need("profanity_check", "toxicity").predict_prob(list(batch))]

    def _verdict(self, row: Conversation, score: float) -> Verdict:
        found = {"none (below 0.5)" if score < 0.5 else f"{int(score * 10) / 10:.1f} and more": 1}
        if score <= self.above:
            return Verdict(row, "", found)
        return Verdict(row if self.action == "report" else None, f"offends (p = {score:.2f})", found)


NAMES = ("toxic", "obscene", "insult", "threat", "hate", "offensive")


@cache
def _by_model(model: str, labels: tuple[str, ...]) -> Any:
    from transformers import pipeline

    try:
        classify = pipeline("text-classification", model=model, top_k=None, truncation=True, device="cpu")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the classifier can't be loaded ({first_line(error)})",
            where="data.clean.toxicity.model",
            fix="Name a folder or a hub model for text classification, such as unitary/toxic-bert.",
        ) from error
    known = list(classify.model.config.id2label.values())
    wanted = {label.casefold() for label in labels}
    counting = [
        label
        for label in known
        if (label.casefold() in wanted if wanted else any(n in label.casefold() for n in NAMES))
        and not (not wanted and label.casefold().startswith(("non", "not")))
    ]
    if not counting:
        raise ModelError(
            f"none of its labels is meant: {', '.join(known)}",
            where="data.clean.toxicity.labels",
            fix="Name the labels that count: toxicity: {model: ..., labels: [...]}",
        )

    def judge(batch: Sequence[str]) -> list[float]:
        return [max(s["score"] for s in scores if s["label"] in counting) for scores in classify(list(batch))]

    return judge
