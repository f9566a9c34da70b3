"""transformers' models as a serving engine: the process that answers (`transformers_host.py`), and its requests."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.inference.child import Child
from tunesmith.inference.engines import Transformers
from tunesmith.inference.grammar import enforceable
from tunesmith.inference.hosted import Hosted
from tunesmith.inference.served import EngineError, Piece, Request, TokenLogprob, TooLong
from tunesmith.models.load import refuse_anothers
from tunesmith.models.resolve import ResolvedModel

HOST = "tunesmith.inference.transformers_host"
NUMBERS = itertools.count(1)


class TransformersChild(Child):
    """A child whose answers are told apart by the numbers of what was asked; None in a queue says that it ended."""

    waiting: dict[int, asyncio.Queue[Any]]

    def listen(self) -> None:
        self.waiting, self.silent = {}, False
        self._hearing = asyncio.create_task(self._hear())

    async def asked(self, **message: Any) -> Any:
        """One answer to one message.

        Raises:
            ModelError, EngineError: as the child says.
        """
        number = next(NUMBERS)
        answers = self.waiting[number] = asyncio.Queue()
        try:
            await self.tell({"number": number, **message})
            found = None if self.silent else await answers.get()
        finally:
            del self.waiting[number]
        if found is None:
            return None
        if "error" in found:
            told = found["error"]
            kind = ModelError if told["type"] == "ModelError" else EngineError
            raise kind(told["what"], where=told["where"], fix=told["fix"])
        return found

    async def _hear(self) -> None:
        while (message := await self.hear()) is not None:
            for piece in message.get("pieces", ()):
                if piece[0] in self.waiting:
                    self.waiting[piece[0]].put_nowait(piece)
            if message.get("done") in self.waiting:
                self.waiting[message["done"]].put_nowait(message)
        self.silent = True  # a moment before the process is known to have ended
        for answers in self.waiting.values():
            answers.put_nowait(None)


class TransformersServing(Hosted):
    kind = "transformers"

    def __init__(self, name: str, model: ResolvedModel, section: Transformers) -> None:
        super().__init__(name, section.tokens(model), section.slots, section.queue)
        self._model, self.precision = model, section.precision
        self._told = {
            "model": {**asdict(model), "path": str(model.path)},
            "precision": section.precision,
            "slots": section.slots,
            "prefix_mb": section.prefix_mb,
        }

    async def load_adapter(self, name: str, path: Path) -> None:
        refuse_anothers(self._model, path)
        async with self._changing:
            if name in self._adapters:
                await self._gone(name)
            if await self._asked(do="load", name=name, path=str(path)) is not None:
                self._adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        self._named(name)
        async with self._changing:
            await self._gone(name)

    async def embed(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """The mean of the last layer's outputs over the prompt, of length 1."""
        for prompt in prompts:
            if len(prompt) > self.context:
                raise TooLong(len(prompt), self.context)
        # One at a time: answers go on between them, and no message grows with their number.
        return [(await self._asked(do="embed", prompt=prompt))["found"] for prompt in prompts]

    async def _read_back(self, request: Request) -> tuple[TokenLogprob, ...]:
        top = request.top_logprobs or 0
        found = await self._asked(do="read", prompt=request.prompt, adapter=request.adapter, top=top)
        return tuple(map(_logprob, found["found"]))

    async def _gone(self, name: str) -> None:
        self._named(name)
        del self._adapters[name]  # no further request may use it
        await self._asked(do="unload", name=name)

    async def _asked(self, **message: Any) -> Any:
        child = self._here()
        assert isinstance(child, TransformersChild)
        found = await child.asked(**message)
        if found is None:
            raise self.down()
        return found

    async def _launch(self, adapters: dict[str, Path]) -> TransformersChild:
        told = self._told | {"adapters": {name: str(path) for name, path in adapters.items()}}
        child = await TransformersChild.start(HOST, told)
        child.listen()
        return child

    async def _answer(self, child: Child, request: Request) -> AsyncGenerator[Piece, None]:
        assert isinstance(child, TransformersChild)
        room = self.context - len(request.prompt)
        request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        if request.grammar is not None:
            request = replace(request, grammar=enforceable(request.grammar))
        number = next(NUMBERS)
        answers = child.waiting[number] = asyncio.Queue()
        finish = None
        try:
            await child.tell({"number": number, "do": "ask", "request": asdict(request)})
            while finish is None:
                found = None if child.silent and answers.empty() else await answers.get()
                if found is None:
                    raise self.down()
                if isinstance(found, dict):
                    raise EngineError(found["error"]["what"])
                _, text, ids, logprobs, finish, cached = found
                if finish == "failed":
                    raise EngineError(f"transformers can't answer it: {text}")
                yield Piece(text, tuple(ids), tuple(map(_logprob, logprobs)), finish, cached if finish else 0)
        finally:
            del child.waiting[number]
            if finish is None:
                await asyncio.shield(child.tell({"number": number, "do": "cancel"}))


def _logprob(told: list[Any]) -> TokenLogprob:
    token, letters, value, *top = told
    return TokenLogprob(token, letters.encode("latin-1"), value, tuple(map(_logprob, top[0])) if top else ())
