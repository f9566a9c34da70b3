"""What chat and plain completions share: limits, beginning an answer, following it, and what is kept of it."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tunesmith.api.errors import ApiError, told
from tunesmith.inference.served import TokenLogprob
from tunesmith.serve.asked import Asked, Call, Delta, Started

T = TypeVar("T")
SPENDING: set[asyncio.Future[None]] = set()  # a task that nobody holds may be forgotten


class Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


class Events(StreamingResponse):
    """An answer as server-sent events. What it holds is freed however it ends, also before it began."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], reply: Reply) -> None:
        quiet = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(_written(events), headers=reply.headers() | quiet)
        self._reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reply.account(499)  # if nothing of it was read
            await self._reply.started.aclose()


async def _written(events: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    try:
        async with aclosing(events):
            async for event in events:
                yield b"data: " + to_json(event) + b"\n\n"
    except Exception as error:  # the status is sent already: it can only be told in the stream
        yield b"data: " + to_json(told(error).body()) + b"\n\n"
    yield b"data: [DONE]\n\n"


async def until_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; it is cancelled when the client goes away.

    Raises:
        ApiError: 499, which nobody reads.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "The client has gone.")
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


@dataclass
class Choice:
    """One answer so far."""

    text: list[str] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: tuple[TokenLogprob, ...] = ()
    finish: str | None = None


@dataclass
class Reply:
    """A request's answers as they come, and the account of them.

    Attributes:
        kind: the route, for metrics and the traffic log: chat, completions.
        asked: as the client wrote it (for the traffic log, where its text is kept).
    """

    request: Request
    who: Any
    kind: str
    id: str
    asked: Asked
    wrote: dict[str, Any]
    started: Started
    created: int = field(default_factory=lambda: int(time.time()))
    began: float = field(default_factory=time.perf_counter)
    choices: dict[int, Choice] = field(default_factory=dict)
    tokens: int = 0
    cached: int = 0
    accounted: bool = False

    async def follow(self) -> AsyncGenerator[Delta, None]:
        """The deltas, kept in `choices` as they pass; at the end, or when it is closed, the account is made."""
        status = 499
        try:
            async with aclosing(self.started.deltas) as deltas:
                async for delta in deltas:
                    choice = self.choices.setdefault(delta.choice, Choice())
                    choice.text.append(delta.text)
                    choice.calls += delta.calls
                    choice.logprobs += delta.logprobs
                    choice.prompt = choice.prompt or delta.prompt
                    choice.finish = delta.finish or choice.finish
                    self.tokens += delta.tokens
                    if delta.choice % self.asked.n == 0:  # a prompt counts once, however many answers it gets
                        self.cached += delta.cached
                    yield delta
            status = 200
        except Exception as error:
            status = told(error).status
            raise
        finally:
            self.account(status)

    async def whole(self) -> list[Choice]:
        """All answers, once they are complete."""
        async with aclosing(self.follow()) as deltas:
            async for _ in deltas:
                pass
        return [self.choices[number] for number in sorted(self.choices)]

    def usage(self) -> dict[str, Any]:
        prompt = self.started.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }

    def headers(self) -> dict[str, str]:
        """What is told beside the answer."""
        state = self.request.app.state.tunesmith
        found = {"x-tunesmith-model": self.started.model.encode("ascii", "replace").decode()}
        if state.settings.cache is not None:
            found["x-tunesmith-cache"] = "hit" if self.started.hit else "miss"
        return found | guarded(self.started.flags)

    def account(self, status: int) -> None:
        """Count and keep the answer, once. Nothing here waits, so that no client escapes it by going away."""
        if self.accounted:
            return
        self.accounted = True
        state = self.request.app.state.tunesmith
        total = self.started.prompt_tokens + self.tokens
        self.request.state.about.update(
            model=self.asked.model[:200],
            by=self.started.model,
            prompt_tokens=self.started.prompt_tokens,
            completion_tokens=self.tokens,
        )
        said = {
            "choices": [{"content": "".join(c.text), "finish_reason": c.finish} | _calls(c) for c in self._in_order()]
        }
        if state.settings.log_text:
            self.request.state.about.update(asked=self.wrote, answered=said)
        spend(state, self.who.key, total)
        if state.traffic is not None:
            state.traffic.add(
                self.wrote,
                said,
                id=self.id,
                endpoint=self.kind,
                model=self.asked.model,
                project=self.who.project,
                key=self.who.key,
                served_by=self.started.model if self.started.model != self.asked.model else None,
                user=self.asked.user[:255] if self.asked.user else None,
                status=status,
                prompt_tokens=self.started.prompt_tokens,
                completion_tokens=self.tokens,
                seconds=time.perf_counter() - self.began,
                flags=sorted(set(self.started.flags)),
            )

    def _in_order(self) -> list[Choice]:
        return [self.choices[number] for number in sorted(self.choices)]


def guarded(flags: Sequence[str]) -> dict[str, str]:
    """The header that says what guards found."""
    return {"x-tunesmith-guards": ", ".join(sorted(set(flags)))} if flags else {}


def _calls(choice: Choice) -> dict[str, Any]:
    return {"tool_calls": [called(c) for c in choice.calls]} if choice.calls else {}


def called(call: Call) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


async def begin(request: Request, who: Any, asked: Asked, kind: str, prefix: str, wrote: dict[str, Any]) -> Reply:
    """Begin an answer, within the caller's limits.

    Raises:
        ApiError, Refused, EngineError: it can't be had.
    """
    state = request.app.state.tunesmith
    request.state.about["model"] = asked.model[:200]
    await admit(request, who)
    began = time.perf_counter()
    started = await until_gone(request, state.serving.start(asked, kind, who.project, who.key))
    return Reply(request, who, kind, f"{prefix}{secrets.token_hex(12)}", asked, wrote, started, began=began)


async def admit(request: Request, who: Any) -> None:
    """Count a request against the caller's limits.

    Raises:
        Refused: 429.
    """
    state = request.app.state.tunesmith
    await state.limits.enter(who.key, who.rpm)
    if (
        who.token_quota is not None
        and state.traffic is not None
        and await state.traffic.spent(who.key) >= who.token_quota
    ):
        raise ApiError(429, f"Your key has used its {who.token_quota} tokens.", code="insufficient_quota")


def spend(state: Any, key: str, tokens: int) -> None:
    """Count tokens against a key's day, whatever becomes of the request."""
    task = asyncio.ensure_future(state.limits.spend(key, tokens))
    SPENDING.add(task)
    task.add_done_callback(SPENDING.discard)


def logprob(one: TokenLogprob) -> float | None:
    """A log-probability as JSON can hold it; None where there is none."""
    return None if math.isnan(one.logprob) else max(one.logprob, -9999.0)
