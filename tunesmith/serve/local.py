"""A model of this server answers: rendered, asked of its engine, read back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tunesmith.conversation.message import Message
from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.inference.served import Request
from tunesmith.runs import hash_json
from tunesmith.serve import retrieve
from tunesmith.serve.asked import Asked, Delta, Deltas, Passage, Refused, Started
from tunesmith.serve.cache import Cache, packed, unpacked
from tunesmith.serve.models import Served
from tunesmith.serve.section import ServeSection
from tunesmith.serve.streams import merged
from tunesmith.serve.tools import Format, Reader, either, forced, format_of, prepared, read_calls

T = TypeVar("T")
LONG = 20_000  # characters whose tokens take some milliseconds
Watch = Callable[[Deltas, bool], Deltas]  # puts guards around an answer; whether it is JSON


class Local:
    """Answers by models of this server."""

    def __init__(self, settings: ServeSection, cache: Cache | None) -> None:
        self._settings, self._cache = settings, cache
        self._copies: WeakKeyDictionary[Renderer, Renderer] = WeakKeyDictionary()
        self._reading = asyncio.Lock()

    async def begin(
        self, served: Served, asked: Asked, passages: Sequence[Passage], watch: Watch, project: str | None = None
    ) -> Started:
        """An answer that is about to begin: nothing is asked of the engine before its first delta is.

        Args:
            project: who asks; what the cache has of one project is given to no other.

        Raises:
            Refused: it does not fit, or names a tool that is not there.
        """
        renderer = served.renderer
        of_tools = asked.tools or any(m.more or m.role == "tool" for m in asked.messages)
        format = format_of(renderer) if of_tools else Format()
        schema = forced(asked, format)
        tools = asked.tools if asked.tool_choice != "none" else ()
        prefix = ""
        if asked.prompts:
            prompts = await self.ids(served, asked.prompts)
        else:
            opened, size = prepared(_opened(asked, served.system), format), sum(len(m.content) for m in asked.messages)
            prompts = [await self._aside(served, size, lambda s: self._rendered(s, opened, passages))]
        if schema is not None:
            prompts, prefix = [ids + renderer.continued(format.before) for ids in prompts], format.open
        elif asked.grammar is not None:
            schema = asked.grammar
            if tools:  # calls are bare JSON then; any object can be one
                format = Format(before="", open="", close="", name=format.name, arguments=format.arguments)
                calls = forced(replace(asked, tool_choice="required"), format)
                schema = either(schema, calls) if schema and calls else schema
        requests = [self._request(served, asked, ids, schema, choice) for ids in prompts for choice in range(asked.n)]
        streams: list[Deltas] = []
        hits = 0
        for choice, request in enumerate(requests):
            key = _key(served, request, project) if self._cache is not None and asked.deterministic else None
            kept = await self._kept(key)
            hits += kept is not None
            stream = _replayed(kept, choice) if kept is not None else self._asked(served, request, choice, key)
            if tools:
                stream = read_calls(stream, Reader(format, tools), asked.parallel, prefix)
            streams.append(watch(stream, schema is not None and not tools))
        return Started(
            served.name,
            sum(map(len, prompts)),
            merged(streams, served.engine.slots),
            tuple(p if isinstance(p, str) else renderer.tokenizer.decode(p) for p in asked.prompts),
            tuple(passages),
            hit=hits == len(requests),
        )

    async def ids(self, served: Served, prompts: Sequence[str | list[int]], param: str = "prompt") -> list[list[int]]:
        """Plain prompts as token ids; `param` is the field that has them."""
        size = sum(len(p) for p in prompts if isinstance(p, str))
        return await self._aside(served, size, lambda s: [self._ids(s, p, param) for p in prompts])

    async def _aside(self, served: Served, size: int, work: Callable[[Served], T]) -> T:
        """What takes long is done in a thread, while other requests go on; with a tokenizer of its own, since
        transformers changes a tokenizer's settings while it reads."""
        if size < LONG:
            return work(served)
        async with self._reading:
            copied = self._copies.get(served.renderer)
            if copied is None:
                copied = self._copies[served.renderer] = deepcopy(served.renderer)
            return await asyncio.to_thread(work, replace(served, renderer=copied))

    def _rendered(self, served: Served, asked: Asked, passages: Sequence[Passage]) -> list[int]:
        messages: Sequence[Message] = asked.messages
        if passages and self._settings.retrieve is not None:
            messages = retrieve.shown(messages, passages, self._settings.retrieve.instruction)
        try:
            return served.renderer.prompt(messages, asked.tools)
        except ModelError as error:
            raise Refused(
                f"This model's chat template can't write these messages: {error.what}", param="messages"
            ) from None

    def _ids(self, served: Served, prompt: str | list[int], param: str) -> list[int]:
        if isinstance(prompt, str):
            return served.renderer.text_ids(prompt) or [_first_token(served)]
        size = len(served.renderer.tokenizer)
        wrong = next((i for i in prompt if not 0 <= i < size), None)
        if wrong is not None:
            raise unknown_token(wrong, size, param)
        return prompt

    def _request(
        self, served: Served, asked: Asked, ids: list[int], schema: dict[str, Any] | None, choice: int
    ) -> Request:
        context, wanted = served.engine.context, asked.max_tokens
        if len(ids) + (1 if wanted is None else wanted) > context:
            raise too_long(context, len(ids), wanted or 0, "messages" if asked.messages else "prompt")
        size = len(served.renderer.tokenizer)
        wrong = next((token for token in asked.logit_bias if not 0 <= token < size), None)
        if wrong is not None:
            raise unknown_token(wrong, size, "logit_bias")
        most = min(context - len(ids), asked.longest or context)
        return Request(
            prompt=ids,
            max_new_tokens=most if wanted is None else wanted,
            stop_ids=tuple(served.renderer.stop_ids),
            adapter=served.adapter,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=None if asked.seed is None else asked.seed + choice,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=asked.logit_bias,
            stop=asked.stop,
            top_logprobs=asked.top_logprobs,
            echo=asked.echo,
            grammar=schema,
        )

    async def _kept(self, key: str | None) -> list[Delta] | None:
        if self._cache is None or key is None:
            return None
        kept = await self._cache.get(key)
        return unpacked(kept) if kept is not None else None

    async def _asked(self, served: Served, request: Request, choice: int, key: str | None) -> Deltas:
        if request.max_new_tokens == 0 and not request.echo:  # only the text of an echo was asked for
            yield Delta(choice, finish="length")
            return
        deltas: list[Delta] = []
        async with aclosing(served.engine.stream(request)) as pieces:
            async for p in pieces:
                told = (p.finish, p.cached, p.drafted, p.accepted, p.prompt)
                delta = Delta(choice, p.text, (), p.logprobs, len(p.ids), *told)
                if key is not None:
                    deltas.append(replace(delta, drafted=0, accepted=0))  # given again, nothing is proposed
                yield delta
        if key is not None and self._cache is not None and deltas and deltas[-1].finish:
            await self._cache.put(key, packed(deltas))


async def _replayed(deltas: Sequence[Delta], choice: int) -> Deltas:
    for delta in deltas:
        yield replace(delta, choice=choice)


def _opened(asked: Asked, system: str | None) -> Asked:
    """Under the system message that the model was trained with, unless the conversation has its own."""
    if system is None or (asked.messages and asked.messages[0].role == "system"):
        return asked
    return replace(asked, messages=(Message("system", system), *asked.messages))


def _first_token(served: Served) -> int:
    """What an empty prompt is: the model needs something to go on from."""
    tokenizer = served.renderer.tokenizer
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return int(found or 0)


def _key(served: Served, request: Request, project: str | None) -> str:
    engine = served.engine
    weights = [served.identity, served.name, engine.kind, getattr(engine, "precision", None)]
    return hash_json([project, *weights, asdict(request) | {"logit_bias": sorted(request.logit_bias.items())}])


def unknown_token(token: int, size: int, param: str) -> Refused:
    return Refused(f"Token {token} is not in this model's vocabulary of {size}.", param=param)


def too_long(context: int, prompt: int, completion: int, param: str = "messages") -> Refused:
    """In the words by which clients know it; `param` is the field to blame."""
    return Refused(
        f"This model's maximum context length is {context} tokens. However, you requested {prompt + completion} tokens "
        f"({prompt} in the {param}, {completion} in the completion). Please reduce the length of the {param} or "
        "completion.",
        code="context_length_exceeded",
        param=param,
    )
