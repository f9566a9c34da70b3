"""Another server answers: where a route falls back to `https://host/v1#name`, and guard models elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from tunesmith.inference.endpoint import Endpoint, is_endpoint
from tunesmith.inference.served import TokenLogprob
from tunesmith.serve.asked import Asked, Call, Delta, Deltas, Refused, Started

__all__ = ["Remote", "is_endpoint"]
DONE: dict[str, Any] = {}
PASSED_ON = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "n")


class Remote:
    """OpenAI-compatible servers, by `URL#MODEL`. The key is OPENAI_API_KEY, if that is set."""

    def __init__(self, timeout: float) -> None:
        import httpx2

        self._client = httpx2.AsyncClient(timeout=httpx2.Timeout(timeout, connect=5.0))

    async def close(self) -> None:
        await self._client.aclose()

    def begin(self, name: str, asked: Asked) -> Started:
        """An answer that is about to begin.

        Raises:
            Refused: a completion is asked for, or what only a model here can do.
        """
        if asked.prompts:
            raise Refused("The model that would answer can only chat.", status=503, code="fallback_failed")
        endpoint = Endpoint(name)
        started = Started(endpoint.model, 0, _nothing())  # its address is nobody's business
        started.deltas = self._deltas(endpoint, asked, started)
        return started

    async def _deltas(self, endpoint: Endpoint, asked: Asked, started: Started) -> Deltas:
        import httpx2

        key = os.environ.get("OPENAI_API_KEY")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        url = f"{os.path.expandvars(endpoint.name).partition('#')[0].rstrip('/')}/chat/completions"
        try:
            async with self._client.stream("POST", url, json=_body(endpoint.model, asked), headers=headers) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _failed(f"status {response.status_code}")
                calls: dict[tuple[int, int], dict[str, str]] = {}
                open: dict[int, bool] = {}  # choices, and whether they have not ended
                counted = 0
                async with aclosing(_events(response)) as events:
                    async for event in events:
                        if event is DONE:
                            break
                        if "error" in event:
                            raise _failed("an error in mid-stream")
                        if usage := event.get("usage"):
                            started.prompt_tokens = int(usage.get("prompt_tokens") or 0)
                            more = int(usage.get("completion_tokens") or counted) - counted
                            counted += more
                            yield Delta(next(iter(open), 0), tokens=more)
                        for choice in event.get("choices", ()):
                            delta = _delta(choice, calls)
                            counted += delta.tokens
                            open[delta.choice] = delta.finish is None
                            yield delta
                    else:
                        if any(open.values()) or not open:
                            raise _failed("it ended early")
                for number in (n for n, still in open.items() if still):
                    yield _delta({"index": number, "finish_reason": "stop"}, calls)
        except (httpx2.HTTPError, ValueError, KeyError, TypeError) as error:
            raise _failed(type(error).__name__) from error


def _body(model: str, asked: Asked) -> dict[str, Any]:
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    body["messages"] = [m.for_template() for m in asked.messages]
    body |= {k: v for k in PASSED_ON if (v := getattr(asked, k)) is not None}
    for message in body["messages"]:
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            if not isinstance(arguments, str):
                call["function"] = call["function"] | {"arguments": json.dumps(arguments, ensure_ascii=False)}
    if (longest := asked.max_tokens or asked.longest) is not None:
        body["max_tokens"] = longest
    if asked.top_logprobs is not None:
        body |= {"logprobs": True} | ({"top_logprobs": asked.top_logprobs} if asked.top_logprobs else {})
    if asked.stop:
        body["stop"] = list(asked.stop)
    if asked.tools:
        named = isinstance(asked.tool_choice, tuple)
        choice = {"type": "function", "function": {"name": asked.tool_choice[1]}} if named else asked.tool_choice
        body |= {"tools": list(asked.tools), "tool_choice": choice}
        body |= {} if asked.parallel else {"parallel_tool_calls": False}
    if asked.grammar is not None:
        schema = {"name": "answer", "schema": asked.grammar, "strict": True}
        whole = {"type": "json_schema", "json_schema": schema} if asked.grammar else {"type": "json_object"}
        body["response_format"] = whole
    return body


def _delta(choice: dict[str, Any], calls: dict[tuple[int, int], dict[str, str]]) -> Delta:
    """A chunk's choice; parts of calls are put together until the last chunk."""
    index, told, finish = choice.get("index", 0), choice.get("delta") or {}, choice.get("finish_reason")
    for part in told.get("tool_calls") or ():
        call = calls.setdefault((index, part.get("index", 0)), {"id": "", "name": "", "arguments": ""})
        call["id"] = part.get("id") or call["id"]
        function = part.get("function") or {}
        call["name"] += function.get("name") or ""
        call["arguments"] += function.get("arguments") or ""
    whole = tuple(Call(**c) for (i, _), c in sorted(calls.items()) if i == index) if finish else ()
    text = told.get("content") or ""
    likely = tuple(_likely(t) for t in (choice.get("logprobs") or {}).get("content") or ())
    return Delta(index, text, whole, likely, 1 if text else 0, finish)


def _likely(told: dict[str, Any]) -> TokenLogprob:
    """A token's log-probability; its id is not told."""
    data = bytes(told["bytes"]) if told.get("bytes") is not None else str(told["token"]).encode()
    return TokenLogprob(-1, data, float(told["logprob"]), tuple(map(_likely, told.get("top_logprobs") or ())))


async def _events(response: Any) -> AsyncGenerator[dict[str, Any], None]:
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            yield DONE if line[5:].strip() == "[DONE]" else json.loads(line[5:])


async def _nothing() -> Deltas:
    return
    yield


def _failed(why: str) -> Refused:
    return Refused(f"The server that would answer does not ({why}).", status=503, code="fallback_failed", retry_after=2)
