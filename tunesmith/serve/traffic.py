"""What is kept of requests and answers: written behind the answers' backs, redacted, and forgotten in time."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.serve.section import TrafficSection

if TYPE_CHECKING:
    from tunesmith.store.database import Store

Told = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]  # request, response, about
log = logging.getLogger("tunesmith.serve")
MOST = 10_000  # answers that may wait to be written; beyond them the oldest are lost, and that is told
AT_ONCE = 200
SWEEP = 3600.0  # seconds between looks for what is too old


class Traffic:
    """The traffic log of a server with a database. Entered, it writes; left, it has written everything."""

    def __init__(self, store: Store, section: TrafficSection) -> None:
        self._store, self._section = store, section
        self._waiting: list[Told] = []
        self._spent: Counter[str] = Counter()  # used, as far as the store does not know of it
        self._owed: Counter[str] = Counter()  # of these, what could not be charged
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
            for _, _, about in self._waiting[:-MOST]:  # lost, but not free
                self._owed[about["key"]] += about["prompt_tokens"] + about["completion_tokens"]
            del self._waiting[:-MOST]
        self._wake.set()

    async def spent(self, key: str) -> int:
        """Tokens that a key has used in all."""
        return await asyncio.to_thread(self._store.keys.spent, key) + self._spent[key]

    async def feedback(self, answer: str, **said: Any) -> str | None:
        """Keep what somebody says of an answer; its id, or None where there is no such answer."""
        await self._write()  # it may be of the answer just given
        own = {k: said[k] for k in ("correction", "comment") if said.get(k)}
        none = self._section.text == "none"
        kept = dict.fromkeys(own) if none else await asyncio.to_thread(_each, own, self._change)
        return await asyncio.to_thread(lambda: self._store.feedback.add(answer, **(said | kept)))

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
                try:
                    await asyncio.to_thread(self._keep, some)
                except Exception:  # the database's troubles are not the answers'
                    log.exception("%d answers could not be kept", len(some))
                await self._spend(some)
            if time.monotonic() - self._swept > SWEEP or not self._swept:
                self._swept = time.monotonic()
                try:
                    before = time.time() - self._section.days * 86_400
                    await asyncio.to_thread(self._store.traffic.forget, before)
                except Exception:
                    log.exception("answers older than %s days could not be removed yet", self._section.days)

    async def _spend(self, some: Sequence[Told]) -> None:
        """Charge keys for answers. What can't be charged now counts on here, and is charged with what comes next."""
        for _, _, about in some:
            self._owed[about["key"]] += about["prompt_tokens"] + about["completion_tokens"]
        for key, tokens in [(k, t) for k, t in self._owed.items() if t]:
            try:
                await asyncio.to_thread(self._store.keys.spend, key, tokens)
            except Exception:
                log.exception("%d tokens could not be charged yet", tokens)
                continue
            self._owed[key] -= tokens
            self._spent[key] -= tokens

    def _keep(self, some: Sequence[Told]) -> None:
        from tunesmith.store.answers import Answered

        rows: list[Answered] = []
        for request, response, about in some:
            try:
                rows.append(Answered(**about, **self._texts(request, response)))
            except Exception:  # one that can't be redacted is kept without its text
                log.exception("the text of answer %s could not be kept", about["id"])
                rows.append(Answered(**about))
        self._store.traffic.add(*rows)

    def _texts(self, request: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
        if self._section.text == "none":
            return {}
        return {"request": _each(request, self._change), "response": _each(response, self._change)}

    def _change(self, text: str) -> str:
        from tunesmith.screen.hide import hidden

        return hidden(text) if self._section.text == "redacted" else text


def _each(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with its texts changed. The character 0, which PostgreSQL can't hold, is left out."""
    if isinstance(value, str):
        return change(value).replace("\0", "")
    if isinstance(value, list):
        return [_each(v, change) for v in value]
    return {k: _each(v, change) for k, v in value.items()} if isinstance(value, dict) else value
