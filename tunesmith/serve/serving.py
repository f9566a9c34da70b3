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
from tunesmith.inference.served import EngineError, EngineFull, GrammarError, TooLong, Unserved
from tunesmith.serve import routes
from tunesmith.serve.asked import Asked, Deltas, Passage, Refused, Started
from tunesmith.serve.cache import cache
from tunesmith.serve.guards.screen import Guards
from tunesmith.serve.local import Local, too_long
from tunesmith.serve.metrics import Metrics
from tunesmith.serve.models import Models, unknown
from tunesmith.serve.remote import Remote, is_endpoint
from tunesmith.serve.retrieve import retriever
from tunesmith.serve.section import RouteSection, ServeSection
from tunesmith.serve.streams import late, primed, within

log = logging.getLogger("tunesmith.serve")
SHADOWS = 8  # requests that may be asked in the shadow at once
LOOKED = 1.0  # seconds between looks at the routes' file
RETRY = 30.0  # seconds until a model that could not be opened is tried again
EMBEDDED = 64  # requests for embeddings that may wait at once
BATCH = 16  # texts that are embedded at once
LETTERS = 16  # more of them are in no token, but in runs of blanks
JUDGED_TOKENS = 24  # of a guard model's answer


class Serving:
    """Answers requests by the models of a server.

    Args:
        routes_file: as `tunesmith promote` writes it; read again when it changes.

    Attributes:
        fetch: opens a model by its name, where a route names one that is not there; and whether it was promoted
            though a gate holds it.
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
        self._turn, self._embedding = asyncio.Lock(), 0
        self._shadows: set[asyncio.Task[None]] = set()
        self._taking: set[asyncio.Task[None]] = set()
        self._version, self._retry = 0, float("inf")
        self.fetch: Callable[[str, bool], Awaitable[None]] | None = None
        self._follow()

    async def close(self) -> None:
        tasks = [*self._shadows, *self._taking]
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
            known = [s.engine.context for s in self.models if s.name in way.models]
            if known and not any(map(is_endpoint, way.models)):
                _fits(max(known), asked.messages, asked.prompts, "messages" if asked.messages else "prompt")
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

    async def embed(
        self, model: str, prompts: Sequence[str | list[int]], project: str | None
    ) -> tuple[list[Any], int, list[str]]:
        """Vectors, how many tokens were read, and what guards found.

        Raises:
            Refused, EngineError.
        """
        flags: list[str] = []
        served = self.models.get(model, project)
        if self._embedding >= EMBEDDED:
            raise EngineFull(f"{self._embedding} requests for embeddings wait already")
        self._embedding += 1
        try:
            async with asyncio.timeout(self.settings.deadline):
                _fits(served.engine.context, (), prompts, "input")
                prompts = await self._passed(prompts, (served.name,), project, "input", flags)
                ids = await self._local.ids(served, prompts, "input")
                longest = max(map(len, ids))
                if longest > served.engine.context:
                    raise too_long(served.engine.context, longest, 0, "input")
                vectors: list[Any] = []
                for start in range(0, len(ids), BATCH):  # others have their turn between
                    async with self._turn:
                        vectors += await served.engine.embed(ids[start : start + BATCH])
        except TimeoutError:
            raise late(self.settings.deadline) from None
        finally:
            self._embedding -= 1
        tokens = sum(map(len, ids))
        self.metrics.requests.labels(served.name, "embeddings", 200).inc()
        self.metrics.prompt_tokens.labels(served.name, "embeddings").inc(tokens)
        return vectors, tokens, flags

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
        if changed == self._seen and self._looked < self._retry:
            return
        self._seen, self._retry = changed, float("inf")
        self._version += 1
        try:
            found = dict(self.settings.routes) | routes.read(self._file)
        except TunesmithError as error:
            log.error("the routes stay as they were: %s", error)
            return
        missing = [m for m in routes.named(found) if m not in self.models and not is_endpoint(m)]
        if missing and self.fetch is not None:
            forced = routes.forced(self._file)
            task = asyncio.create_task(self._take(found, {name: name in forced for name in missing}, self._version))
            self._taking.add(task)
            task.add_done_callback(self._taking.discard)
        else:
            self._taken(found)

    async def _take(self, found: dict[str, RouteSection], missing: dict[str, bool], version: int) -> None:
        """Take routes over once the models that they name are there; until then the old ones hold. Where the file has
        changed meanwhile, that one counts."""
        assert self.fetch is not None
        try:
            for name, forced in missing.items():
                if version == self._version:
                    await self.fetch(name, forced)
        except Exception as error:
            if version == self._version:
                self._retry = time.monotonic() + RETRY
            what = error if isinstance(error, TunesmithError) else f"{type(error).__name__}: {error}"
            log.error("the routes stay as they were, until they are tried again in %d s: %s", RETRY, what)
        else:
            if version == self._version:
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
        prompts = await self._passed(asked.prompts, models, project, "prompt", flags)
        return replace(asked, messages=messages, tools=tools, prompts=prompts), flags

    async def _passed(
        self,
        prompts: Sequence[str | list[int]],
        models: Sequence[str],
        project: str | None,
        param: str,
        flags: list[str],
    ) -> tuple[str | list[int], ...]:
        """Plain prompts as guards let them pass."""
        if not self._guards.input:
            return tuple(prompts)
        left: list[str | list[int]] = []
        for prompt in prompts:
            texts = [prompt] if isinstance(prompt, str) else self._texts(prompt, models, project)
            for text in texts:
                passed = await self._guards.text(text, "user", param, flags)
                if passed != text:
                    prompt = passed
                    break
            left.append(prompt)
        return tuple(left)

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
            except (EngineError, Refused) as error:
                if isinstance(error, Refused):
                    passing = error.status >= 500 or error.code == "model_not_found"
                else:  # what the request itself did wrong is wrong for others too
                    passing = not isinstance(error, TooLong | GrammarError | Unserved)
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
        return await self._local.begin(self.models.get(name, project), asked, passages, watch, project)

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
                given = within(self.settings.deadline, started.deltas)
                async with aclosing(self._counted(started, given, "shadow", began)) as deltas:
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
            text = "".join([delta.text async for delta in deltas])
        if not text.strip():
            raise EngineError(f"the guard model '{model}' said nothing")
        return text

    def _noted(self, kind: str, action: str, side: str) -> None:
        self.metrics.guards.labels(kind, action, side).inc()


def _fits(context: int, messages: Sequence[Message], prompts: Sequence[str | list[int]], param: str) -> None:
    """Refuse what can't fit before anybody reads it; `param` is the field to blame.

    Raises:
        Refused.
    """
    texts = [sum(len(m.content) for m in messages), *(len(p) for p in prompts if isinstance(p, str))]
    if max(texts) > LETTERS * context:
        raise Refused(
            f"This model's maximum context length is {context} tokens. However, you sent {max(texts)} characters.",
            code="context_length_exceeded",
            param=param,
        )


def _of_ours(error: BaseException) -> bool:
    return isinstance(error, Exception)
