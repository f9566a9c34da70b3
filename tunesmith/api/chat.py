"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tunesmith.api.answering import Choice, Events, Json, Reply, begin, called, logprob, until_gone
from tunesmith.api.auth import needs
from tunesmith.api.bodies import ChatBody
from tunesmith.api.schemas import ERRORS, ChatCompletion
from tunesmith.inference.served import TokenLogprob
from tunesmith.serve.asked import Delta
from tunesmith.serve.retrieve import cited

router = APIRouter(tags=["chat"])


@router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ERRORS)
async def chat(body: ChatBody, request: Request, who: Any = needs("runner", "chat")) -> Response:
    """An answer to a conversation. With `stream`, as server-sent events."""
    settings = request.app.state.tunesmith.settings
    asked = body.asked(settings.temperature, settings.max_new_tokens)
    wrote = {"messages": [m.model_dump(exclude_none=True) for m in body.messages]}
    reply = await begin(request, who, asked, "chat", "chatcmpl-", wrote)
    if body.stream:
        return Events(chunks(reply, body.with_usage, bool(body.logprobs)), reply)
    choices = await until_gone(request, reply.whole())
    return Json(
        _frame(reply, "chat.completion")
        | {"choices": [_whole(reply, i, c, bool(body.logprobs)) for i, c in enumerate(choices)]}
        | {"usage": reply.usage()}
        | _sources(reply),
        headers=reply.headers(),
    )


def _frame(reply: Reply, kind: str) -> dict[str, Any]:
    return {
        "id": reply.id,
        "object": kind,
        "created": reply.created,
        "model": reply.asked.model,
        "system_fingerprint": f"fp_{reply.started.model}",
        "service_tier": "default",
    }


def _whole(reply: Reply, number: int, choice: Choice, with_logprobs: bool) -> dict[str, Any]:
    text = "".join(choice.text)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if choice.calls else ""), "refusal": None}
    if choice.calls:
        message["tool_calls"] = [called(call) for call in choice.calls]
    if reply.started.sources:
        message["annotations"] = _annotations(reply, text)
    told = {"content": _logprobs(choice.logprobs), "refusal": None} if with_logprobs else None
    return {"index": number, "message": message, "logprobs": told, "finish_reason": choice.finish or "stop"}


async def chunks(reply: Reply, with_usage: bool, with_logprobs: bool) -> AsyncGenerator[dict[str, Any], None]:
    """The chunks of a streamed answer, all with one id and time."""
    frame = _frame(reply, "chat.completion.chunk") | ({"usage": None} if with_usage else {})
    begun: dict[int, int] = {}  # calls told so far, by choice
    async for delta in reply.follow():
        if delta.choice not in begun:
            begun[delta.choice] = 0
            first = {"role": "assistant", "content": "", "refusal": None}
            sources = _sources(reply) if len(begun) == 1 else {}
            yield frame | sources | {"choices": [_part(delta.choice, first)]}
        told: dict[str, Any] = {"content": delta.text} if delta.text else {}
        if delta.calls:
            told["tool_calls"] = [
                {"index": begun[delta.choice] + i} | called(call) for i, call in enumerate(delta.calls)
            ]
            begun[delta.choice] += len(delta.calls)
        if told or (with_logprobs and delta.logprobs):
            shown = _logprobs(delta.logprobs) if with_logprobs else None
            yield frame | {"choices": [_part(delta.choice, told, shown)]}
        if delta.finish:
            yield frame | {"choices": [_last(reply, delta)]}
    if with_usage:
        yield frame | {"choices": [], "usage": reply.usage()}


def _part(number: int, delta: dict[str, Any], logprobs: list[Any] | None = None) -> dict[str, Any]:
    told = None if logprobs is None else {"content": logprobs, "refusal": None}
    return {"index": number, "delta": delta, "logprobs": told, "finish_reason": None}


def _last(reply: Reply, delta: Delta) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if reply.started.sources:
        told["annotations"] = _annotations(reply, "".join(reply.choices[delta.choice].text))
    return {"index": delta.choice, "delta": told, "logprobs": None, "finish_reason": delta.finish}


def _logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    def one(token: TokenLogprob) -> dict[str, Any]:
        return {"token": token.text, "logprob": logprob(token), "bytes": list(token.data)}

    return [one(token) | {"top_logprobs": [one(t) for t in token.top]} for token in tokens]


def _sources(reply: Reply) -> dict[str, Any]:
    """The passages that the model was shown, by their numbers."""
    found = [
        {"index": i, "title": p.title, "source": p.source, "score": p.score, "text": p.text}
        for i, p in enumerate(reply.started.sources, 1)
    ]
    return {"sources": found} if found else {}


def _annotations(reply: Reply, text: str) -> list[dict[str, Any]]:
    """Where the answer cites passages."""
    return [
        {
            "type": "url_citation",
            "url_citation": {"start_index": start, "end_index": end, "title": p.title, "url": p.source},
        }
        for start, end, p in cited(text, reply.started.sources)
    ]
