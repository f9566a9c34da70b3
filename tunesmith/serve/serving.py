"""One request's way: guards, routing, passages, an answer by whoever can give it, guards again; counted as it goes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunesmith.conversation.message import Message
from tunesmith.errors import TunesmithError
from tunesmith.inference.served import EngineDown, EngineFull
from tunesmith.serve import routes
from tunesmith.serve.asked import Asked, Deltas, Passage, Refused, Started
from tunesmith.serve.cache import cache
from tunesmith.serve.guards.screen import Guards
from tunesmith.serve.local import Local
from tunesmith.serve.metrics import Metrics
from tunesmith.serve.models import Models, unknown
from tunesmith.serve.remote import Remote, is_endpoint
from tunesmith.serve.retrieve import retriever
from tunesmith.serve.section import RouteSection, ServeSection
from tunesmith.serve.streams import primed, within

log = logging.getLogger("tunesmith.serve")
SHADOWS = 8  # requests that may be asked in the shadow at once
LOOKED = 1.0  # seconds between looks at the routes' file
JUDGED_TOKENS = 24  # of a guard model's answer


class Serving:
    """Answers requests by the models of a server.

    Args:
        routes_file: as `tunesmith promote` writes it; read again when it changes.

    Attributes:
        fetch: opens a model by its name, where a route names one that is not there.
    """

    def __init__(self, settings: ServeSection, models: Models, routes_file: Path | None = None) -> None:
        self.settings, self.models, self.metrics = settings, models, Metrics()
        self._local = Local(settings, cache(settings.cache) if settings.cache else None)
        self._remote = Remote(settings.deadline)
        for guard in settings.guards:
            guard.load()
        self._guards = Guards(settings.guards, self._judged, self._noted)
        self._retriever = retriever(settings.retrieve) if settings.retrieve else None
        self._file, self._seen, self._looked = routes_file, 0, 0.0
        self.routes: dict[str, RouteSection] = dict(settings.routes)
        self._shadows: set[asyncio.Task[None]] = set()
        self._taking: asyncio.Task[None] | None = None
        self.fetch: Callable[[str], Awaitable[None]] | None = None
        self._follow()

    async def close(self) -> None:
        tasks = [*self._shadows, *([self._taking] if self._taking else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._remote.close()

    async def start(self, asked: Asked, route: str, project: str | None, key: str) -> Started:
        """An answer, once its first piece is there.

        Args:
            route: which of the API's routes it came by, for the metrics.

        Raises:
            Refused: it can't be had.
            EngineError: the engine can't give it, nor can a fallback.
        """
        began = time.perf_counter()
        try:
            way = self._way(asked, key)
            asked, flags = await self._guarded(asked, way.models, project)
            passages = await self._passages(asked)
            started = await self._answer(way.models, asked, project, passages, flags)
        except BaseException as error:
            status = error.status if isinstance(error, Refused) else "cancelled" if not _of_ours(error) else "error"
            name = asked.model if asked.model in self.models or asked.model in self.routes else "unknown"
            self.metrics.requests.labels(name, route, status).inc()
            raise
        if way.shadow:
            self._shadow(way.shadow, asked, project, passages)
        started.flags = flags
        started.deltas = self._counted(started, started.deltas, route, began)
        return started

    async def embed(self, model: str, prompts: Sequence[str | list[int]], project: str | None) -> Any:
        """Vectors, and how many tokens were read.

        Raises:
            Refused, EngineError.
        """
        served = self.models.get(model, project)
        ids = [self._local._ids(served, p) for p in prompts]
        vectors = await served.engine.embed(ids)
        tokens = sum(map(len, ids))
        self.metrics.requests.labels(served.name, "embeddings", 200).inc()
        self.metrics.prompt_tokens.labels(served.name, "embeddings").inc(tokens)
        return vectors, tokens

    def _way(self, asked: Asked, key: str) -> routes.Way:
        self._follow()
        route = self.routes.get(asked.model)
        return routes.way(route, asked.model, asked.user or key) if route else routes.Way((asked.model,))

    def _follow(self) -> None:
        """Take over the routes' file where it has changed. One that can't be read changes nothing."""
        if self._file is None or time.monotonic() - self._looked < LOOKED:
            return
        self._looked = time.monotonic()
        try:
            changed = self._file.stat().st_mtime_ns
        except OSError:
            return
        if changed == self._seen:
            return
        self._seen = changed
        try:
            found = dict(self.settings.routes) | routes.read(self._file)
        except TunesmithError as error:
            log.error("the routes stay as they were: %s", error)
            return
        missing = [m for m in routes.named(found) if m not in self.models and not is_endpoint(m)]
        if missing and self.fetch is not None:
            self._taking = asyncio.create_task(self._take(found, missing))
        else:
            self._taken(found)

    async def _take(self, found: dict[str, RouteSection], missing: Sequence[str]) -> None:
        """Take routes over once the models that they name are there; until then the old ones hold."""
        assert self.fetch is not None
        try:
            for name in missing:
                await self.fetch(name)
        except TunesmithError as error:
            log.error("the routes stay as they were: %s", error)
        else:
            self._taken(found)

    def _taken(self, found: dict[str, RouteSection]) -> None:
        self.routes = found
        log.info("routes: %s", {name: dict(r.versions) for name, r in found.items()})

    async def _guarded(self, asked: Asked, models: Sequence[str], project: str | None) -> tuple[Asked, list[str]]:
        """What is asked, as guards let it pass, and what they found. Prompts of token ids are looked at as the texts
        that they are to each model that may answer."""
        if not self._guards.input:
            return asked, []
        messages, flags = await self._guards.asked(asked.messages)
        tools = tuple(await self._guards.json(list(asked.tools), "user", "tools", flags))
        prompts: list[str | list[int]] = []
        for prompt in asked.prompts:
            texts = [prompt] if isinstance(prompt, str) else self._texts(prompt, models, project)
            for text in texts:
                passed = await self._guards.text(text, "user", "prompt", flags)
                if passed != text:
                    prompt = passed
                    break
            prompts.append(prompt)
        return replace(asked, messages=messages, tools=tools, prompts=tuple(prompts)), flags

    def _texts(self, ids: list[int], models: Sequence[str], project: str | None) -> list[str]:
        tokenizers = [s.renderer.tokenizer for s in self.models if s.name in models and s.visible(project)]
        return list(dict.fromkeys(t.decode([i for i in ids if 0 <= i < len(t)]) for t in tokenizers))

    async def _passages(self, asked: Asked) -> list[Passage]:
        question = next((m.content for m in reversed(asked.messages) if m.role == "user"), "")
        return await self._retriever.find(question) if self._retriever and question.strip() else []

    async def _answer(
        self, models: Sequence[str], asked: Asked, project: str | None, passages: Sequence[Passage], flags: list[str]
    ) -> Started:
        """The first answer that begins, of models in order."""
        for number, name in enumerate(models):
            try:
                started = await self._begin(name, asked, project, passages, flags)
                started.source = within(self.settings.deadline, started.deltas)
                started.deltas = await primed(started.source)
            except (EngineDown, EngineFull, Refused) as error:
                passing = not isinstance(error, Refused) or error.status >= 500 or error.code == "model_not_found"
                if number + 1 == len(models) or not passing:
                    raise
                log.warning("'%s' did not answer (%s): asking '%s'", name, error, models[number + 1])
                self.metrics.fallbacks.labels(name, asked.model).inc()
            else:
                return started
        raise unknown(asked.model, [s.name for s in self.models])

    async def _begin(
        self, name: str, asked: Asked, project: str | None, passages: Sequence[Passage], flags: list[str]
    ) -> Started:
        def watch(deltas: Deltas, structured: bool) -> Deltas:
            return self._guards.answered(deltas, flags, structured)

        if is_endpoint(name):
            started = self._remote.begin(name, asked)
            started.deltas = self._guards.answered(started.deltas, flags, asked.grammar is not None, asked.n)
            return started
        return await self._local.begin(self.models.get(name, project), asked, passages, watch)

    async def _counted(self, started: Started, given: Deltas, route: str, began: float) -> Deltas:
        """The answer as it is, with what Prometheus is told of it."""
        of, by = self.metrics, (started.model, route)
        first = last = 0.0
        tokens, status = 0, "cancelled"
        of.running(*by, 1)
        if self.settings.cache:
            (of.cache_hits if started.hit else of.cache_misses).labels(*by).inc()
        try:
            async with aclosing(given) as deltas:
                async for delta in deltas:
                    last = time.perf_counter()
                    first = first or last
                    tokens += delta.tokens
                    if delta.finish:
                        of.cached_tokens.labels(*by).inc(delta.cached)
                        of.drafted.labels(*by).inc(delta.drafted)
                        of.accepted.labels(*by).inc(delta.accepted)
                    yield delta
            status = "200"
        except Exception:
            status = "error"
            raise
        finally:
            of.running(*by, -1)
            of.requests.labels(*by, status).inc()
            of.prompt_tokens.labels(*by).inc(started.prompt_tokens)
            of.completion_tokens.labels(*by).inc(tokens)
            if first:
                of.first.labels(*by).observe(first - began)
                of.seconds.labels(*by).observe(last - began)
                if tokens > 1:
                    of.token.labels(*by).observe((last - first) / (tokens - 1))

    def _shadow(self, name: str, asked: Asked, project: str | None, passages: Sequence[Passage]) -> None:
        """Ask another model as well. Its answer goes to the metrics alone, and what goes wrong to the log."""
        if len(self._shadows) >= SHADOWS:
            return

        async def ask() -> None:
            began = time.perf_counter()
            try:
                started = await self._begin(name, asked, project, passages, [])
                async with aclosing(self._counted(started, started.deltas, "shadow", began)) as deltas:
                    async for _ in deltas:
                        pass
            except TunesmithError as error:
                log.warning("'%s' did not answer in the shadow: %s", name, error)

        self.metrics.shadows.labels(name, asked.model).inc()
        task = asyncio.create_task(ask())
        self._shadows.add(task)
        task.add_done_callback(self._shadows.discard)

    async def _judged(self, model: str, messages: Sequence[Message]) -> str:
        """A guard model's answer. A guard that can't answer lets nothing through."""
        asked = Asked(model, tuple(messages), temperature=0.0, max_tokens=JUDGED_TOKENS)
        if is_endpoint(model):
            started = self._remote.begin(model, asked)
        else:
            started = await self._local.begin(self.models.get(model), asked, (), lambda deltas, _: deltas)
        async with aclosing(within(self.settings.deadline, started.deltas)) as deltas:
            return "".join([delta.text async for delta in deltas])

    def _noted(self, kind: str, action: str, side: str) -> None:
        self.metrics.guards.labels(kind, action, side).inc()


def _of_ours(error: BaseException) -> bool:
    return isinstance(error, Exception)
