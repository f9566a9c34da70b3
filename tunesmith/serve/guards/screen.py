"""Guards at work: on what is asked, and on an answer as it comes, of which nothing is shown before it was looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from tunesmith.conversation.message import Message
from tunesmith.screen.inside import in_json
from tunesmith.serve.asked import Call, Delta, Deltas, Refused
from tunesmith.serve.guards.guard import Ask, Finding, Guard

STEP = 80  # characters that come before a stream is looked at again
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
        """The messages as they may be answered, and what was found.

        Raises:
            Refused: a guard blocks it.
        """
        found: list[str] = []
        if not self.input:
            return tuple(messages), found
        passed = []
        for message in messages:
            text = message.content
            if message.role in ("user", "tool") and text:
                text, flags, blocked = await self._looked(self.input, text, message.role, "input")
                found += flags
                if blocked:
                    raise Refused(
                        f"The request was refused by a guard ({blocked}).", code="content_filter", param="messages"
                    )
            passed.append(message if text == message.content else replace(message, content=text))
        return tuple(passed), found

    async def _looked(self, guards: Sequence[Guard], text: str, role: str, side: str) -> tuple[str, list[str], str]:
        """The text redacted, what was found, and the kind that blocks it ("" if none does)."""
        flags = []
        for guard in guards:
            found = await guard.check(text, role, self._ask)
            for kind in sorted({f.kind for f in found}):
                self._note(kind, guard.action, side)
                flags.append(kind)
            if found and guard.action == "block":
                return text, flags, found[0].kind
            if guard.action == "redact":
                text = redacted(text, found)
        return text, flags, ""

    def answered(self, deltas: Deltas, flags: list[str], structured: bool) -> Deltas:
        """An answer's deltas, looked at before they are shown. What is found is added to `flags`.

        Args:
            structured: the answer is JSON: it is held back whole, so that what is redacted leaves it JSON.
        """
        return _Answer(self, flags, structured).pass_on(deltas) if self.output else deltas


class _Answer:
    """One answer under guard. `said` is all that the model gave, of which `shown` characters were looked at."""

    def __init__(self, guards: Guards, flags: list[str], structured: bool) -> None:
        self._guards, self._flags, self._structured = guards, flags, structured
        self._reach = max(g.reach for g in guards.output)
        self._said, self._shown = "", 0
        self._logprobs: list[tuple[int, int, Any]] = []  # where each token's text begins and ends
        self._known: set[tuple[str, int]] = set()

    async def pass_on(self, deltas: Deltas) -> Deltas:
        async with aclosing(deltas):
            async for delta in deltas:
                self._take(delta)
                last = delta.finish is not None
                calls, blocked = await self._calls(delta.calls)
                waiting = len(self._said) - self._shown
                if not (last or calls or blocked or (not self._structured and waiting >= self._reach + STEP)):
                    yield replace(delta, text="", logprobs=(), calls=())
                    continue
                text, logprobs, cut = await self._look(last)
                if cut or blocked:
                    yield replace(delta, text=text, logprobs=logprobs, calls=(), finish="content_filter")
                    return
                yield replace(delta, text=text, logprobs=logprobs, calls=calls)

    def _take(self, delta: Delta) -> None:
        at = len(self._said)
        for one in delta.logprobs:
            self._logprobs.append((at, at + len(one.text), one))
            at += len(one.text)
        self._said += delta.text

    async def _calls(self, calls: tuple[Call, ...]) -> tuple[tuple[Call, ...], bool]:
        passed = []
        for call in calls:
            guards = self._guards
            text, flags, blocked = await guards._looked(guards.output, call.arguments, "assistant", "output")
            self._flags += flags
            if blocked:
                return (), True
            if text != call.arguments:
                text = in_json(call.arguments, self._redact_with(guards.output))
            passed.append(replace(call, arguments=text))
        return tuple(passed), False

    def _redact_with(self, guards: Sequence[Guard]) -> Callable[[str], str]:
        def redact(text: str) -> str:
            for guard in guards:
                if guard.action == "redact":
                    text = redacted(text, guard.find(text))
            return text

        return redact

    async def _look(self, last: bool) -> tuple[str, tuple[Any, ...], bool]:
        """What can be shown by now: text and log-probabilities; and whether the answer ends here."""
        # A finding may have begun in what was shown already, if it is longer than what was held back.
        start = max(0, self._shown - self._reach)
        window = self._said[start:]
        until = len(self._said) if last else len(self._said) - self._reach
        cuts: list[tuple[int, int, str]] = []
        for guard in self._guards.output:
            for f in await guard.check(window, "assistant", self._guards._ask):
                begin, end = start + f.start, start + f.end
                if end <= self._shown:
                    continue
                if (f.kind, begin) not in self._known:
                    self._known.add((f.kind, begin))
                    self._guards._note(f.kind, guard.action, "output")
                    self._flags += [f.kind] if f.kind not in self._flags else []
                if guard.action == "block":
                    text = self._said[self._shown : max(begin, self._shown)]
                    return self._without(text, cuts, max(begin, self._shown)), (), True
                if guard.action == "redact":
                    cuts.append((max(begin, self._shown), end, f.instead))
        for begin, end, _ in cuts:  # nothing is shown in parts
            if begin < until < end:
                until = begin
        text = self._without(self._said[self._shown : until], cuts, until)
        if self._structured and cuts:
            text = in_json(self._said[self._shown : until], self._redact_with(self._guards.output))
        kept = [one for b, e, one in self._logprobs if e <= until and not any(c[0] < e and b < c[1] for c in cuts)]
        self._logprobs = [one for one in self._logprobs if one[1] > until]
        self._shown = until
        return text, tuple(kept), False

    def _without(self, text: str, cuts: Sequence[tuple[int, int, str]], until: int) -> str:
        inside = [Finding("", b - self._shown, e - self._shown, instead) for b, e, instead in cuts if e <= until]
        return redacted(text, inside)


def redacted(text: str, found: Sequence[Finding]) -> str:
    """The text with marks in the place of what was found. Where findings overlap, the first takes the whole."""
    parts, at = [], 0
    for f in sorted(found, key=lambda f: (f.start, -f.end)):
        if f.start >= at:
            parts += [text[at : f.start], f.instead]
        at = max(at, f.end)
    return "".join([*parts, text[at:]])
