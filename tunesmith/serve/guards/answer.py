"""One answer under guard, as it comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from tunesmith.inference.served import TokenLogprob
from tunesmith.screen.escapes import is_like_json, outside, views
from tunesmith.screen.inside import cut_out
from tunesmith.serve.asked import Call, Delta
from tunesmith.serve.guards.guard import Ask, Finding, Guard
from tunesmith.serve.guards.look import Seen, seen, to_block, to_redact

STEP = 80  # characters that come before a stream is looked at again


class Answer:
    """Takes an answer's deltas, and gives them back once they were looked at.

    `_said` is all that the model gave, of which `_shown` characters were dealt with. What is shown is the same however
    the answer is cut into deltas.

    Args:
        structured: the answer is JSON: it is held back whole, so that what is redacted leaves it JSON.
        told: told of what is found for the first time.

    Attributes:
        done: it has come to its end, or was ended by a guard.
        blocked: it was ended by a guard.
    """

    def __init__(
        self, guards: Sequence[Guard], ask: Ask, structured: bool, told: Callable[[Guard, Finding], None]
    ) -> None:
        self._ask, self._told, self._structured = ask, told, structured
        self._within = [g for g in guards if not g.whole]
        self._whole = [g for g in guards if g.whole]
        self._only_flags = all(g.action == "flag" for g in guards)
        self._reach = max(g.reach for g in guards)
        self._said, self._shown, self._due = "", 0, self._reach + STEP
        self._rest: str | None = None  # what stands for all that is to come
        self._known: set[tuple[str, int]] = set()
        self._logprobs = _Logprobs()
        self.done = self.blocked = False

    async def take(self, delta: Delta) -> Delta:
        """What can be shown once this has come."""
        self._said += delta.text
        self._logprobs.take(delta)
        last = delta.finish is not None
        calls, blocked = await self._calls(delta.calls)
        text, until = "", self._shown
        if last or calls or blocked or (not self._structured and len(self._said) >= self._due):
            text, until, ended = await self._look(last or blocked)
            blocked = blocked or ended
        logprobs = self._logprobs.until(self._said, until, self._only_flags)
        self._shown, self.blocked, self.done = until, blocked, last or blocked
        if delta.prompt and not self._only_flags:
            delta = replace(delta, prompt=tuple(replace(token, top=()) for token in delta.prompt))
        if blocked:
            return replace(delta, text=text, logprobs=logprobs, calls=(), finish="content_filter")
        return replace(delta, text=text, logprobs=logprobs, calls=calls)

    async def _calls(self, calls: Sequence[Call]) -> tuple[tuple[Call, ...], bool]:
        passed = []
        for call in calls:
            text, blocked = await self._all(call.arguments)
            if blocked:
                return (), True
            passed.append(replace(call, arguments=text))
        return tuple(passed), False

    async def _all(self, text: str) -> tuple[str, bool]:
        """A whole text, redacted; and whether it must not be shown."""
        for guards in (self._within, self._whole):
            found = await seen(guards, views(text, is_like_json(text)), "assistant", self._ask)
            for guard, f in found:
                self._told(guard, f)
            if to_block(found):
                return "", True
            if cuts := to_redact(found):
                text = cut_out(text, cuts)
        return text, False

    async def _look(self, last: bool) -> tuple[str, int, bool]:
        """What can be shown by now, up to where that is, and whether the answer ends there."""
        shown, self._due = self._shown, len(self._said) + STEP
        if self._structured:
            if not last:
                return "", shown, False
            text, blocked = await self._all(self._said)
            if text != self._said:
                self._logprobs.drop(0, len(self._said), self._said)
            return text, len(self._said), blocked
        if self._rest is not None:
            return self._rest if last else "", shown, False
        # A finding may have begun in what was shown already, if it is longer than what was held back.
        start = outside(self._said, max(0, shown - self._reach))
        window = views(self._said[start:], is_like_json(self._said))
        reads = window[-1]
        until = start + reads.places[len(reads.text) if last else max(0, len(reads.text) - self._reach)]
        until = max(until, shown)
        found = [
            (guard, replace(f, start=start + f.start, end=start + f.end))
            for guard, f in await seen(self._within, window, "assistant", self._ask)
            if start + f.end > shown
        ]
        until = _before(found, until, shown)
        stops = [max(f.start, shown) for guard, f in found if guard.action == "block" and f.start <= until]
        if stops:
            until = _before(found, min(stops), shown)
        self._note([(g, f) for g, f in found if f.start < until + bool(stops and g.action == "block")])
        cuts = [(max(b, shown), e, instead) for b, e, instead in to_redact(found)]
        for b, e, _ in cuts:
            self._logprobs.drop(b, e, self._said)
        if await self._judged(_part(self._said, start, len(self._said), cuts)):
            return "", shown, True
        if self._rest is not None:
            return self._rest if last else "", shown, bool(stops)
        text = _part(self._said, shown, until, cuts)
        self._due = max(self._due, until + self._reach + STEP)
        return text, until, bool(stops)

    async def _judged(self, text: str) -> bool:
        """Ask those that judge whole texts; whether one ends the answer. If one redacts, it is all that is to come."""
        found = await seen(self._whole, views(text, is_like_json(text)), "assistant", self._ask) if text.strip() else []
        self._note([(guard, replace(f, start=0)) for guard, f in found])
        self._rest = next((f.instead for guard, f in found if guard.action == "redact"), None)
        return bool(to_block(found))

    def _note(self, found: Sequence[Seen]) -> None:
        for guard, f in found:
            if (f.kind, f.start) not in self._known:
                self._known.add((f.kind, f.start))
                self._told(guard, f)


def _before(found: Sequence[Seen], until: int, shown: int) -> int:
    """The last place up to `until` that no finding stretches over: nothing is shown in parts."""
    for guard, f in sorted(found, key=lambda s: -s[1].start):
        if guard.action != "flag" and f.start < until < f.end:
            until = f.start
    return max(until, shown)


def _part(text: str, start: int, end: int, cuts: Sequence[tuple[int, int, str]]) -> str:
    """A part of a text without cuts; places are of the text."""
    inside = [(max(b, start) - start, min(e, end) - start, instead) for b, e, instead in cuts if b < end and e > start]
    return cut_out(text[start:end], inside, as_json=False)


class _Logprobs:
    """Log-probabilities that wait for their text to be shown, by where in it, in bytes, their tokens stand."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, int, TokenLogprob]] = []
        self._end, self._apart = 0, False

    def take(self, delta: Delta) -> None:
        self._apart = self._apart or bool(delta.calls)  # from here on they are of calls as well
        for one in delta.logprobs:
            self._waiting.append((self._end, self._end + len(one.data), one))
            self._end += len(one.data)

    def drop(self, start: int, end: int, text: str) -> None:
        """Forget those of a part of the text."""
        b, e = len(text[:start].encode()), len(text[:end].encode())
        self._waiting = [w for w in self._waiting if w[1] <= b or e <= w[0]]

    def until(self, text: str, place: int, with_others: bool) -> tuple[TokenLogprob, ...]:
        """Those of tokens that stand in the text up to a place. Tokens that could have stood there instead were not
        looked at by a guard."""
        if not self._waiting or self._apart:
            return ()
        shown = text[:place].encode("utf-8", "replace")
        ready = [w for w in self._waiting if w[1] <= len(shown)]
        self._waiting = self._waiting[len(ready) :]
        found = [one for b, e, one in ready if shown[b:e] == one.data]
        return tuple(one if with_others else replace(one, top=()) for one in found)
