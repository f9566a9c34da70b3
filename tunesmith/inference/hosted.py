"""What engines with a child process share: places and a queue, health, starting the process again."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

from tunesmith.errors import nearest
from tunesmith.inference.child import Child
from tunesmith.inference.served import (
    EngineDown,
    EngineFull,
    Health,
    Piece,
    Request,
    TokenLogprob,
    TooLong,
    UnknownAdapter,
    Unserved,
)

log = logging.getLogger("tunesmith.engine")
WAITS = (0.0, 0.5, 2.0, 5.0, 15.0, 30.0)  # seconds before each further start of a process that ended
STEADY = 60.0  # seconds after which a process that ends is started at once again
GIVEN_UP = 4  # starts that failed in a row until the engine is called failed (it is still tried)


class Hosted(ABC):
    """An engine whose model is held by a child. What differs is how one is launched and asked.

    Args:
        slots: requests that are answered at once.
        queue: requests that may wait beyond those.
    """

    kind = "hosted"
    precision = "auto"

    def __init__(self, name: str, context: int, slots: int, queue: int) -> None:
        self.name, self.context, self.slots, self.queue = name, context, slots, queue
        self.waiting = 0
        self.restarts = self._in_a_row = 0
        self._free = asyncio.Semaphore(slots)
        self._child: Child | None = None
        self._state: Health = "starting"
        self._closing = False
        self._adapters: dict[str, Path] = {}
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def _launch(self, adapters: dict[str, Path]) -> Child:
        """A child that answers, with these adapters."""

    @abstractmethod
    def _answer(self, child: Child, request: Request) -> AsyncGenerator[Piece, None]:
        """What a child gives; closing it frees what the child has for the request."""

    async def _read_back(self, request: Request) -> tuple[TokenLogprob, ...]:
        """What the model thinks of a prompt's own tokens.

        Raises:
            Unserved: the engine does not tell.
        """
        raise Unserved(
            f"the engine {self.kind} tells no log-probabilities of a prompt: leave out echo or logprobs",
            fix="Serve it with engine: transformers.",
        )

    @abstractmethod
    async def load_adapter(self, name: str, path: Path) -> None:
        """See `ServingEngine`."""

    async def start(self) -> None:
        async with self._changing:
            self._adopt(await self._launch(self._adapters))

    async def close(self) -> None:
        self._closing, self._state = True, "failed"
        child, self._child = self._child, None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if child:
            await child.end()

    def health(self) -> Health:
        return self._state

    def adapters(self) -> list[str]:
        return list(self._adapters)

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        if len(request.prompt) >= self.context:
            raise TooLong(len(request.prompt), self.context)
        self._named(request.adapter)
        if request.max_new_tokens < 1 and not request.echo:
            yield Piece("", finish="length")
            return
        async with self._slot():
            self._named(request.adapter)  # it may have gone while this one waited
            child = self._here()
            child.take()
            try:
                if request.echo:
                    yield Piece("", prompt=await self._read_back(request))
                if request.max_new_tokens < 1:
                    yield Piece("", finish="length")
                    return
                async with aclosing(self._answer(child, request)) as pieces:
                    async for piece in pieces:
                        yield piece
            finally:
                child.give()

    def down(self) -> EngineDown:
        """The error for a request whose process has gone."""
        what = "has ended and is being started again" if self._state != "starting" else "has not started yet"
        return EngineDown(f"the engine of '{self.name}' {what}", fix="Ask again in a moment.")

    def _here(self) -> Child:
        if self._child is None:
            raise self.down()
        return self._child

    def _named(self, adapter: str | None) -> None:
        if adapter is not None and adapter not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise UnknownAdapter(
                f"no adapter is called '{adapter}'{nearest(adapter, self._adapters)}", fix=f"Loaded: {known}."
            )

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """A place among those that are answered, in the order of asking."""
        if self._free.locked() and self.waiting >= self.queue:
            raise EngineFull(f"{self.waiting} requests wait for '{self.name}' already", fix="Ask again a little later.")
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        try:
            yield
        finally:
            self._free.release()

    def _adopt(self, child: Child) -> None:
        """Ask this child from now on. An earlier one ends when it has answered."""
        before, self._child, self._state = self._child, child, "ready"
        self._background(self._tend(child))
        if before:
            self._background(self._retire(before))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire(self, child: Child) -> None:
        try:
            await child.drained()
        finally:
            await child.end()

    async def _tend(self, child: Child) -> None:
        """Start another when this one ends by itself."""
        began = time.monotonic()
        code = await asyncio.shield(child.ended)
        if child is not self._child:
            return
        self._child, self._state = None, "restarting"
        log.warning("the engine of '%s' ended (code %s); starting it again\n%s", self.name, code, child.last_words)
        await child.end(patience=0)
        if time.monotonic() - began > STEADY:
            self._in_a_row = 0
        failures = 0
        while not self._closing:
            await asyncio.sleep(WAITS[min(self._in_a_row, len(WAITS) - 1)])
            self.restarts, self._in_a_row = self.restarts + 1, self._in_a_row + 1
            try:
                await self._again()
                return
            except Exception as error:
                failures += 1
                log.error("the engine of '%s' does not start: %s", self.name, error)
                if failures >= GIVEN_UP:
                    self._state = "failed"

    async def _again(self) -> None:
        """Start with the adapters that were loaded; where that fails, without any, and load those that can be."""
        late: dict[str, Path] = {}
        async with self._changing:
            adapters = {name: path for name, path in self._adapters.items() if path.exists()}
            try:
                child = await self._launch(adapters)
            except Exception as error:
                if not adapters:
                    raise
                log.error("the engine of '%s' does not start with its adapters: %s", self.name, error)
                child, adapters, late = await self._launch({}), {}, adapters
            self._adapters = adapters
            self._adopt(child)
        for name, path in late.items():
            try:
                await self.load_adapter(name, path)
            except EngineDown:  # for the next start
                self._adapters.setdefault(name, path)
            except Exception as error:
                log.error("'%s' is served without its adapter '%s': %s", self.name, name, error)
