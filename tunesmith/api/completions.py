"""POST /v1/completions: plain texts and token ids, without a chat template."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tunesmith.api.answering import Events, Json, Reply, begin, logprob, until_gone
from tunesmith.api.auth import needs
from tunesmith.api.bodies import CompletionBody
from tunesmith.api.schemas import ERRORS, Completion
from tunesmith.inference.served import TokenLogprob

router = APIRouter(tags=["completions"])


@router.post("/v1/completions", response_model=Completion, responses=ERRORS)
async def completions(body: CompletionBody, request: Request, who: Any = needs("runner", "chat")) -> Response:
    """What comes after a text. With `stream`, as server-sent events of the same shape."""
    settings = request.app.state.tunesmith.settings
    asked = body.asked(settings.temperature, settings.max_new_tokens)
    reply = await begin(request, who, asked, "completions", "cmpl-", {"prompt": body.prompt})
    echoes = [text if body.echo else "" for text in reply.started.prompts for _ in range(asked.n)]
    frame = {"id": reply.id, "object": "text_completion", "created": reply.created, "model": asked.model}
    frame["system_fingerprint"] = f"fp_{reply.started.model}"
    if body.stream:
        parts = _chunks(reply, frame, echoes, body.with_usage, body.logprobs is not None)
        return Events(parts, reply)
    choices = [
        {
            "index": i,
            "text": echo + "".join(choice.text),
            "logprobs": _logprobs(choice.prompt, choice.logprobs, len(echo)) if body.logprobs is not None else None,
            "finish_reason": choice.finish or "stop",
        }
        for i, (echo, choice) in enumerate(zip(echoes, await until_gone(request, reply.whole()), strict=True))
    ]
    return Json(frame | {"choices": choices, "usage": reply.usage()}, headers=reply.headers())


async def _chunks(
    reply: Reply, frame: dict[str, Any], echoes: Sequence[str], with_usage: bool, with_logprobs: bool
) -> AsyncGenerator[dict[str, Any], None]:
    frame |= {"usage": None} if with_usage else {}
    said: dict[int, int] = {}  # characters told so far, by choice
    async for delta in reply.follow():
        echo = "" if delta.choice in said else echoes[delta.choice]
        begun, text = said.get(delta.choice, len(echo)), echo + delta.text
        if text or delta.finish or (with_logprobs and (delta.logprobs or delta.prompt)):
            choice = {"index": delta.choice, "text": text, "logprobs": None, "finish_reason": delta.finish}
            if with_logprobs:
                choice["logprobs"] = _logprobs(delta.prompt, delta.logprobs, begun)
            yield frame | {"choices": [choice]}
        said[delta.choice] = begun + len(delta.text)
    if with_usage:
        yield frame | {"choices": [], "usage": reply.usage()}


def _logprobs(prompt: Sequence[TokenLogprob], answer: Sequence[TokenLogprob], at: int) -> dict[str, Any]:
    """As this older route has them: lists beside one another. A prompt's first token has none: null.

    Args:
        at: where the answer begins, after what is echoed; in letters.
    """
    tokens = [*prompt, *answer]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [logprob(token) for token in tokens],
        "top_logprobs": [
            None if math.isnan(token.logprob) else {t.text: logprob(t) for t in token.top} for token in tokens
        ],
        "text_offset": [*_offsets(prompt, 0), *_offsets(answer, at)],
    }


def _offsets(tokens: Sequence[TokenLogprob], at: int) -> Iterator[int]:
    for token in tokens:
        yield at
        at += len(token.text)
