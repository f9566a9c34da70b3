"""What is kept of requests and answers: written behind the answers' backs, redacted, and forgotten in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tunesmith.serve.section import TrafficSection

if TYPE_CHECKING:
    from tunesmith.store.database import Store

log = logging.getLogger("tunesmith.serve")
MOST = 10_000  # answers that may wait to be written; beyond them the oldest are lost, and that is told
AT_ONCE = 200
SWEEP = 3600.0  # seconds between looks for what is too old


class Traffic:
    """The traffic log of a server with a database. Entered, it writes; left, it has written everything."""

    def __init__(self, store: Store, section: TrafficSection) -> None:
        self._store, self._section = store, section
        self._waiting: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        self._spent: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._writing = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._swept = 0.0

    def add(self, request: dict[str, Any], response: dict[str, Any], **about: Any) -> None:
        """Keep an answer; `about` is what `store.answers.Answered` has besides the texts."""
        self._spent[about["key"]] += about["prompt_tokens"] + about["completion_tokens"]
        self._waiting.append((request, response, about))
        if len(self._waiting) > MOST:
            log.error("the database is too slow: %d answers were not kept", len(self._waiting) - MOST)
            del self._waiting[:-MOST]
        self._wake.set()

    async def spent(self, key: str) -> int:
        """Tokens that a key has used in all."""
        return await asyncio.to_thread(self._store.keys.spent, key) + self._spent[key]

    async def feedback(self, answer: str, **said: Any) -> str | None:
        """Keep what somebody says of an answer; its id, or None where there is no such answer."""
        await self._write()  # it may be of the answer just given
        return await asyncio.to_thread(lambda: self._store.feedback.add(answer, **said))

    async def __aenter__(self) -> Traffic:
        self._task = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._write()

    async def _work(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), SWEEP)
            await asyncio.sleep(0.2)  # more of them in one transaction
            self._wake.clear()
            await self._write()

    async def _write(self) -> None:
        async with self._writing:
            while self._waiting:
                some, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
                spent: Counter[str] = Counter()
                for _, _, about in some:
                    spent[about["key"]] += about["prompt_tokens"] + about["completion_tokens"]
                try:
                    await asyncio.to_thread(self._keep, some, spent)
                except Exception:  # the database's troubles are not the answers'
                    log.exception("%d answers could not be kept", len(some))
                self._spent -= spent
            if time.monotonic() - self._swept > SWEEP or not self._swept:
                self._swept = time.monotonic()
                with contextlib.suppress(Exception):
                    before = time.time() - self._section.days * 86_400
                    await asyncio.to_thread(self._store.traffic.forget, before)

    def _keep(self, some: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]], spent: Counter[str]) -> None:
        from tunesmith.screen.hide import hidden
        from tunesmith.store.answers import Answered

        rows: list[Answered] = []
        for request, response, about in some:
            texts = {} if self._section.text == "none" else {"request": request, "response": response}
            change = hidden if self._section.text == "redacted" else str
            rows.append(Answered(**about, **{side: _each(value, change) for side, value in texts.items()}))
        self._store.traffic.add(*rows)
        for key, tokens in spent.items():
            if tokens:
                self._store.keys.spend(key, tokens)


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with its texts changed. The character 0, which PostgreSQL can't hold, is left out."""
    if isinstance(value, str):
        return change(value).replace("\0", "")
    if isinstance(value, list):
        return [_each(v, change) for v in value]
    return {k: _each(v, change) for k, v in value.items()} if isinstance(value, dict) else value
