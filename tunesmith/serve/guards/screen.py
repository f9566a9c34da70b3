"""Guards at work: on what is asked, and on an answer as it comes, of which nothing is shown before it was looked at."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tunesmith.conversation.message import Message
from tunesmith.screen.escapes import is_like_json, views
from tunesmith.screen.inside import cut_out
from tunesmith.serve.asked import Deltas, Refused
from tunesmith.serve.guards.answer import Answer
from tunesmith.serve.guards.guard import Ask, Finding, Guard
from tunesmith.serve.guards.look import seen, to_block, to_redact
from tunesmith.serve.streams import merged

FIELDS = frozenset(["tool_calls", "function", "name", "arguments", "parameters", "type", "reasoning_content"])
Note = Callable[[str, str, str], None]  # kind, action, side


class Guards:
    """All guards of a server.

    Args:
        ask: a model's answer by its name.
        note: told of every finding.
    """

    def __init__(self, guards: Sequence[Guard], ask: Ask, note: Note) -> None:
        self._ask, self._note = ask, note
        self.input = [g for g in guards if g.on != "output"]
        self.output = [g for g in guards if g.on != "input"]

    async def asked(self, messages: Sequence[Message]) -> tuple[tuple[Message, ...], list[str]]:
        """The messages as they may be answered, and what was found. All that a client wrote is looked at, whoever is to
        have said it: a client writes the assistant's turns as well.

        Raises:
            Refused: a guard blocks it.
        """
        flags: list[str] = []
        if not self.input:
            return tuple(messages), flags
        passed = []
        for message in messages:
            text = await self.text(message.content, message.role, "messages", flags)
            more = await self.json(message.more, message.role, "messages", flags)
            same = text == message.content and more == message.more
            passed.append(message if same else replace(message, content=text, more=more))
        return tuple(passed), flags

    async def json(self, value: Any, role: str, param: str, flags: list[str]) -> Any:
        """The same for what is JSON: the definitions of tools, and what a message has besides its text."""
        if not self.input or not value:
            return value
        text = json.dumps(value, ensure_ascii=False)
        passed = await self.text(text, role, param, flags)
        left = value if passed == text else json.loads(passed)
        if not _has_same(FIELDS, value, left):
            raise Refused("A guard found what can't be taken out of the request.", code="content_filter", param=param)
        return left

    async def text(self, text: str, role: str, param: str, flags: list[str]) -> str:
        """The same for one text of a request. What is found is added to `flags`.

        Raises:
            Refused: a guard blocks it; names `param`.
        """
        for whole in (False, True):
            guards = [g for g in self.input if g.whole is whole]
            if not text or not guards:
                continue
            found = await seen(guards, views(text, is_like_json(text)), role, self._ask)
            for kind, action in sorted({(f.kind, guard.action) for guard, f in found}):
                self._note(kind, action, "input")
                flags.append(kind)
            if blocked := to_block(found):
                raise Refused(f"The request was refused by a guard ({blocked}).", code="content_filter", param=param)
            if cuts := to_redact(found):
                text = cut_out(text, cuts)
        return text

    def answered(self, deltas: Deltas, flags: list[str], structured: bool, choices: int = 1) -> Deltas:
        """Answers' deltas, looked at before they are shown. What is found is added to `flags`.

        Args:
            structured: the answers are JSON: they are held back whole, so that what is redacted leaves them JSON.
            choices: how many answers there are.
        """
        if not self.output:
            return deltas
        if any(g.asks for g in self.output):
            # What is asked of a model may wait for the slot that this answer has: it goes on meanwhile.
            deltas = merged([deltas], 1)
        return self._watched(deltas, flags, structured, choices)

    async def _watched(self, deltas: Deltas, flags: list[str], structured: bool, choices: int) -> Deltas:
        def told(guard: Guard, found: Finding) -> None:
            self._note(found.kind, guard.action, "output")
            flags.extend([found.kind] if found.kind not in flags else [])

        answers: dict[int, Answer] = {}
        async with aclosing(deltas):
            async for delta in deltas:
                if delta.choice not in answers:
                    answers[delta.choice] = Answer(self.output, self._ask, structured, told)
                answer = answers[delta.choice]
                if not answer.blocked:
                    yield await answer.take(delta)
                if answer.blocked and sum(a.done for a in answers.values()) >= choices:
                    return


def _has_same(fields: frozenset[str], value: Any, left: Any) -> bool:
    """Whether a JSON value has the fields that it had."""
    if isinstance(value, list | tuple):
        return all(_has_same(fields, v, w) for v, w in zip(value, left, strict=True))
    if not isinstance(value, dict) or value == left:
        return True
    return fields & value.keys() <= left.keys() and all(
        _has_same(fields, value[k], left[k]) for k in fields & value.keys()
    )
