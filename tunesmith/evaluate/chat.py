"""Talks of several turns, such as MT-Bench's: each turn is answered after the answers before it, and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.conversation.message import Message
from tunesmith.evaluate.asking import question_of
from tunesmith.evaluate.section import SuiteSection
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask


@dataclass(frozen=True)
class Chat:
    """A suite's talks: rows with `turns`, and `reference`, an answer a turn, where there are such."""

    suite: SuiteSection
    rows: Sequence[dict[str, Any]]

    def answers(self, subject: Kept) -> list[list[str]]:
        """Of each talk, a model's answer to each turn."""
        found: list[list[str]] = [[] for _ in self.rows]
        for turn in range(max(len(row["turns"]) for row in self.rows)):
            going = [i for i, row in enumerate(self.rows) if turn < len(row["turns"])]
            asks = [Ask(tuple(self._messages(i, found[i]))) for i in going]
            for i, reply in zip(going, subject.replies(asks, self.suite.max_new_tokens, lambda _: None), strict=True):
                found[i].append(reply.text)
        return found

    def asked(self, given: Sequence[Sequence[str]]) -> list[tuple[str, str | None, str]]:
        """(what was said so far, reference, answer) of each turn of each talk."""
        found = []
        for i, answers in enumerate(given):
            references = self.rows[i].get("reference") or []
            for turn, answer in enumerate(answers):
                reference = str(references[turn]) if turn < len(references) else None
                found.append((question_of(self._messages(i, answers[:turn])), reference, answer))
        return found

    def by_talk(self, scores: Sequence[float]) -> list[float]:
        """Each talk's mean over its turns."""
        left, found = iter(scores), []
        for row in self.rows:
            of_talk = [next(left) for _ in row["turns"]]
            found.append(sum(of_talk) / len(of_talk))
        return found

    def _messages(self, i: int, answers: Sequence[str]) -> list[Message]:
        turns = self.rows[i]["turns"]
        before = [m for asked, told in zip(turns, answers, strict=False) for m in _turn(asked, told)]
        return [*before, Message("user", turns[len(answers)])]


def _turn(asked: str, told: str) -> tuple[Message, Message]:
    return Message("user", asked), Message("assistant", told)
