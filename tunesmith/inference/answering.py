"""A serving engine as what evaluation and chat ask: the same answers, from code that is not asynchronous."""

from __future__ import annotations

import asyncio
import weakref
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from tunesmith import plugins
from tunesmith.conversation.render import Rendered
from tunesmith.errors import ModelError
from tunesmith.inference.engine import Sampling, Score, Tick
from tunesmith.inference.served import Request, ServingEngine
from tunesmith.models.load import is_adapter
from tunesmith.models.machine import Machine
from tunesmith.models.resolve import ResolvedModel

WAITING = 1_000_000  # as many as are asked
TUNED = "tuned"


class Answering:
    """An engine of `plugins.BUILT_IN["serving"]`, started for a model with an adapter (plain LoRA), or for the model
    that full training saved. Its process ends with this object, or with ours.

    Raises:
        ModelError: this engine can't take the model or the adapter.
    """

    kind = "auto"

    def __init__(self, model: ResolvedModel, machine: Machine, adapter: Path | None = None) -> None:
        if adapter and not is_adapter(adapter):
            model, adapter = replace(model, path=adapter, source="folder", new_words=()), None
        section = plugins.load("serving", self.kind)(queue=WAITING)
        self._runner = asyncio.Runner()
        self._engine: ServingEngine = section.build(model.name, model)
        self._adapter = TUNED if adapter else None
        self._runner.run(self._start(adapter))
        self.close = weakref.finalize(self, _close, self._runner, self._engine)

    async def _start(self, adapter: Path | None) -> None:
        await self._engine.start()
        if adapter:
            await self._engine.load_adapter(TUNED, adapter)

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        tick: Tick,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        async def one(prompt: list[int]) -> list[int]:
            request = replace(self._request(prompt, max_new_tokens, stop_ids, sampling), whole=True)
            found = await self._ids(request, lambda token: None)
            tick(1)
            return found

        async def every() -> list[list[int]]:
            return await asyncio.gather(*map(one, prompts))

        return self._runner.run(every())

    def stream(
        self, prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int], on_token: Callable[[int], None]
    ) -> list[int]:
        return self._runner.run(self._ids(self._request(prompt, max_new_tokens, stop_ids, None), on_token))

    def score(self, rows: Sequence[Rendered], tick: Tick) -> list[Score]:
        self._no_likelihoods()

    def embed(self, rows: Sequence[list[int]], tick: Tick) -> Any:
        vectors = np.array(self._runner.run(self._engine.embed(rows)))
        tick(len(rows))
        return vectors

    def likeliest(self, rows: Sequence[Rendered], at: Sequence[Any] | None, k: int, tick: Tick) -> list[Any]:
        self._no_likelihoods()

    def _no_likelihoods(self) -> NoReturn:
        raise ModelError(
            f"the engine {self._engine.kind} gives no likelihoods of given texts",
            where=self._engine.name,
            fix="Take engine transformers where likelihoods are needed.",
        )

    def _request(self, prompt: list[int], limit: int, stop_ids: Sequence[int], sampling: Sampling | None) -> Request:
        request = Request(prompt, limit, tuple(stop_ids), adapter=self._adapter)
        if sampling is None:
            return request
        # What is drawn for a prompt follows from the seed and the prompt, not from its neighbours.
        seed = zlib.crc32(f"{sampling.seed}:{prompt}".encode())
        return replace(request, temperature=sampling.temperature, seed=seed)

    async def _ids(self, request: Request, on_token: Callable[[int], None]) -> list[int]:
        ids: list[int] = []
        async for piece in self._engine.stream(request):
            ids += piece.ids
            for token in piece.ids:
                on_token(token)
        return ids


class LlamaCpp(Answering):
    kind = "llamacpp"


class Vllm(Answering):
    kind = "vllm"


def _close(runner: asyncio.Runner, engine: ServingEngine) -> None:
    runner.run(engine.close())
    runner.close()
