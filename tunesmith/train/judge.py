"""Answers to validation rows while a model is trained: some to be read, some to be scored.

How a model answers and how answers are scored is handed in: the loop knows neither engines nor metrics.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tunesmith.conversation.message import Conversation
from tunesmith.errors import DataError
from tunesmith.models.packed import PackedForward
from tunesmith.runs import Run, append_jsonl
from tunesmith.train.section import TrainSection

# Greedy answers of the model as it is now; of at most so many tokens, or as long as the references need if None.
Ask = Callable[[PackedForward, Sequence[Conversation], int | None], list[str]]
# A metric's name, answers and their rows: its value, and whether higher is better.
Score = Callable[[str, Sequence[str], Sequence[Conversation]], tuple[float, bool]]
SHOWN_TOKENS = 128  # of an answer that is only to be read


class Judge:
    """Asks the same rows at each validation.

    Args:
        rows: the validation rows, of which some are drawn by seed.
        ask, score: how; without them nothing is asked.

    Raises:
        DataError: `train.best_by` is a score of answers, and there are no rows that can be answered.
    """

    def __init__(
        self,
        section: TrainSection,
        rows: Sequence[Conversation],
        seed: int,
        ask: Ask | None,
        score: Score | None,
        run: Run,
    ) -> None:
        can = [row for row in rows if row.kind == "conversation"] if section.method.head == "language" else []
        scored = section.best_by != "loss"
        if scored and not (can and ask and score):
            raise DataError(
                f"is {section.best_by}, and there are no validation rows that can be answered",
                where="train.best_by",
                fix="Take train.best_by: loss.",
            )
        drawn = random.Random(seed).sample(can, min(len(can), section.scored_rows if scored else section.samples))
        self._rows, self._shown, self._run = drawn, section.samples, run
        self._ask, self._score, self._metric = ask, score, section.best_by if scored else None
        self.higher_is_better = False

    def __call__(self, forward: PackedForward, step: int) -> dict[str, float]:
        """Ask, keep the answers that are to be read in `run.samples`, and return the score by its metric's key."""
        if not self._rows or self._ask is None:
            return {}
        training = forward.model.training
        forward.model.eval()
        with torch.random.fork_rng():
            answers = self._ask(forward, self._rows, None if self._metric else SHOWN_TOKENS)
        forward.model.train(training)
        for row, answer in list(zip(self._rows, answers, strict=True))[: self._shown]:
            append_jsonl(self._run.samples, _sample(step, row, answer))
        if self._metric is None or self._score is None:
            return {}
        value, self.higher_is_better = self._score(self._metric, answers, self._rows)
        return {f"validation_{self._metric}": value}


def _sample(step: int, row: Conversation, answer: str) -> dict[str, Any]:
    return {"step": step, "row": row.id, "asked": row.prompt[-1].content, "reference": row.answer, "answer": answer}
