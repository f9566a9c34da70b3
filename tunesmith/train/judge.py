"""Answers to validation rows while a model is trained: some to be read, some to be scored.

How a model answers and how answers are scored is handed in: the loop knows neither engines nor metrics.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from tunesmith.conversation.message import Conversation, Text, tags
from tunesmith.errors import DataError
from tunesmith.models.packed import PackedForward
from tunesmith.train.section import TAGGED, TrainSection

# Greedy answers of the model as it is now (to a plain text: how it goes on); of at most so many tokens, or as long as
# the references need if None.
Ask = Callable[[PackedForward, Sequence[Conversation], int | None], list[str]]
# A metric's name, answers and their rows: its value, and whether higher is better.
Score = Callable[[str, Sequence[str], Sequence[Conversation]], tuple[float, bool]]
SHOWN_TOKENS = 128  # of an answer that is only to be read
TRIED_TOKENS = 8  # of the one that is tried before training
SHOWN_TEXT = 200  # characters of a plain text that are given, at most; of what follows, three times as many are shown


class Judge:
    """Asks the same rows at each validation.

    Args:
        rows: the validation rows, of which some are drawn by seed: those that somebody answered well, or plain texts.
        ask, score: how; without them nothing is asked.

    Raises:
        DataError: `train.best_by` is a score of answers, and there are no rows that can be answered; or it is the loss
            of a tag that no row has.
    """

    def __init__(
        self,
        section: TrainSection,
        rows: Sequence[Conversation],
        seed: int,
        ask: Ask | None,
        score: Score | None,
    ) -> None:
        scored = section.figure is None
        can = [row for row in rows if _answerable(row, scored)] if section.method.head == "language" else []
        if scored and not (can and ask and score):
            raise DataError(
                f"is {section.best_by}, and there are no validation rows that can be answered",
                where="train.best_by",
                fix="Take train.best_by: loss.",
            )
        tagged = [f"{TAGGED}{tag}" for tag in tags(rows)]
        if section.best_by.startswith(TAGGED) and section.best_by not in tagged:
            raise DataError(
                f"is {section.best_by}, and the validation rows have "
                + (f"the tags of {', '.join(tagged)}" if tagged else "fewer than two tags"),
                where="train.best_by",
                fix="Take one of those, or loss." if tagged else "Take train.best_by: loss.",
            )
        drawn = random.Random(seed).sample(can, min(len(can), section.scored_rows if scored else section.samples))
        self._posed, self._shown = [_posed(row) for row in drawn], section.samples
        self._ask, self._score, self._metric = ask, score, section.best_by if scored else None
        self.higher_is_better = bool(section.figure)

    def __call__(
        self, forward: PackedForward, step: int, show: Callable[[list[dict[str, Any]]], object]
    ) -> dict[str, float]:
        """Ask, `show` the answers that are to be read, and return the score by its metric's key."""
        if not self._posed or self._ask is None:
            return {}
        rows = [row for row, _ in self._posed]
        answers = self._answers(forward, rows, None if self._metric else SHOWN_TOKENS)
        told = list(zip(self._posed, answers, strict=True))[: self._shown]
        show([_sample(step, *posed, answer) for posed, answer in told])
        if self._metric is None or self._score is None:
            return {}
        value, self.higher_is_better = self._score(self._metric, answers, rows)
        return {f"validation_{self._metric}": value}

    def attempt(self, forward: PackedForward) -> None:
        """A short answer to the longest of the questions, so that what can't be answered shows before training."""
        if self._posed and self._ask:
            longest = max((row for row, _ in self._posed), key=lambda row: len(row.question))
            self._answers(forward, [longest], TRIED_TOKENS)

    def _answers(self, forward: PackedForward, rows: Sequence[Conversation], limit: int | None) -> list[str]:
        assert self._ask is not None
        training = forward.model.training
        forward.model.eval()
        with torch.random.fork_rng():
            answers = self._ask(forward, rows, limit)
        forward.model.train(training)
        return answers


def _answerable(row: Conversation, scored: bool) -> bool:
    """Whether a row has a question and a good answer to it; or is a plain text, where answers are only read."""
    if isinstance(row, Text):
        return not scored and len(row.text.strip()) > 1
    return bool(row.prompt) and getattr(row, "good", True)  # a bad answer is no reference


def _posed(row: Conversation) -> tuple[Conversation, str]:
    """What is asked of a row, and the reference: of a plain text, a beginning of whole words and what follows it."""
    if not isinstance(row, Text):
        return row, row.answer
    half = row.text[: min(len(row.text) // 2, SHOWN_TEXT)]
    begun = half.rpartition(" ")[0].rstrip() or half
    return replace(row, text=begun), row.text[len(begun) :][: 3 * SHOWN_TEXT]


def _sample(step: int, row: Conversation, reference: str, answer: str) -> dict[str, Any]:
    asked = row.text if isinstance(row, Text) else row.prompt[-1].content
    return {"step": step, "row": row.id, "asked": asked, "reference": reference, "answer": answer}
