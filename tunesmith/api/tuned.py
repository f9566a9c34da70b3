"""Tuned models: they answer on this server while they are in the database, and are deleted for good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request

from tunesmith.api import shapes
from tunesmith.api.auth import needs
from tunesmith.api.errors import ApiError
from tunesmith.api.files import service_of
from tunesmith.api.opening import resolved
from tunesmith.errors import TunesmithError, first_line
from tunesmith.inference.engines import Auto, EngineSection
from tunesmith.jobs.service import Service
from tunesmith.runs import write_json
from tunesmith.serve.asked import Refused
from tunesmith.serve.models import Models, Served
from tunesmith.store import tables as t
from tunesmith.store.audit import record

router = APIRouter(prefix="/v1/models", tags=["models"])
log = logging.getLogger("tunesmith.api")
AGAIN = 5.0  # seconds before a model that could not be loaded is tried again, doubled each time
LONGEST = 300.0
PATIENCE = 20.0  # seconds that whoever asks for a job waits for its models to answer
EVERY = 0.5  # seconds between looks at the database


@router.delete("/{model:path}")
async def delete(request: Request, model: str, caller: Any = needs("admin", "models")) -> dict[str, Any]:
    """Delete a tuned model, its weights too. `dependents` names the jobs that began from it."""
    service = service_of(request)
    told = await asyncio.to_thread(_delete, service, model, caller)
    registry = request.app.state.tunesmith.registry
    if registry is not None:
        await registry.settled(model)
    return told


def _delete(service: Service, name: str, caller: Any) -> dict[str, Any]:
    with service.store.write() as session:
        asked = sa.select(t.Model).where(t.Model.id == name, t.Model.project == caller.project)
        model = session.scalar(asked.with_for_update())
        if model is None:
            raise ApiError(404, f"The model '{name[:200]}' does not exist.", param="model", code="model_not_found")
        jobs = list(session.scalars(sa.select(t.Job).where(t.Job.model == name).order_by(t.Job.n)))
        depend = shapes.unused(jobs, f"Model {name} is trained on", "model", "model_in_use")
        session.execute(sa.delete(t.Permission).where(t.Permission.model == name))
        session.execute(sa.delete(t.Checkpoint).where(t.Checkpoint.model == name))
        session.execute(sa.delete(t.Model).where(t.Model.id == name))
        record(session, caller.project, caller.key, "model.delete", name, {"jobs": depend})
    service.forget(model.artifact)
    return {"id": name, "object": "model", "deleted": True, "dependents": {"jobs": depend}}


class Registry:
    """Keeps what answers in step with the database: models that jobs make appear, deleted ones go. While entered, it
    looks every half second. Each model is loaded in a task of its own, so that one that hangs delays no other.

    Args:
        engine: what runs models that are no plain LoRA on a base.
    """

    def __init__(self, service: Service, models: Models, engine: EngineSection | None = None) -> None:
        self.service, self.models, self.engine = service, models, engine or Auto()
        self.converted = Converted(service.settings.folder / "converted.json")
        self._there: dict[str, frozenset[str]] = {}
        self._changing: dict[str, asyncio.Task[None]] = {}  # models that are loaded or removed just now
        self._failed: dict[str, tuple[float, float]] = {}  # when to try a model again, and how long was waited for it
        self._lock = asyncio.Lock()

    async def sync(self) -> None:
        """Begin what brings the served models up to date."""
        async with self._lock:
            wanted, allowed, systems = await asyncio.to_thread(self._read)
            for name in {*self._there, *self.converted.names} - wanted.keys():
                self._begin(name, self._remove(name))
            self._failed = {name: when for name, when in self._failed.items() if name in wanted}
            for name, model in wanted.items():
                projects = frozenset({model.project, *allowed.get(name, ())})
                if name not in self._there or name not in self.models:
                    if time.monotonic() >= self._failed.get(name, (0.0, 0.0))[0]:
                        self._begin(name, self._add(name, model, projects, systems.get(model.job)))
                elif self._there[name] != projects:
                    self.models.share(name, projects)
                    self._there[name] = projects

    async def settled(self, *names: str) -> None:
        """Wait until models answer that should, and others don't any more, or until that takes too long."""
        await self.sync()
        if tasks := [task for name in names if (task := self._changing.get(name)) is not None]:
            await asyncio.wait(tasks, timeout=PATIENCE)

    async def answer(self, *names: str) -> None:
        """As `settled`, for models that a client is about to be told of."""
        if any(name not in self._there for name in names):
            try:
                await self.settled(*names)
            except Exception as error:  # what is told is true all the same
                log.warning("models were not looked at: %s", type(error).__name__)

    def _read(self) -> tuple[dict[str, t.Model], dict[str, list[str]], dict[str, str | None]]:
        """Models by name, the projects that may use them besides their own, and jobs' system prompts."""
        with self.service.store.read() as session:
            models = {m.id: m for m in session.scalars(sa.select(t.Model).where(~t.Model.held).order_by(t.Model.n))}
            allowed: dict[str, list[str]] = {}
            for permission in session.scalars(sa.select(t.Permission)):
                allowed.setdefault(permission.model, []).append(permission.project)
            new = {model.job for name, model in models.items() if name not in self._there}
            jobs = session.execute(sa.select(t.Job.id, t.Job.settings).where(t.Job.id.in_(new))) if new else ()
            systems = {id: (settings.get("data") or {}).get("system") for id, settings in jobs}
        return models, allowed, systems

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        if name in self._changing:
            work.close()
        else:
            task = self._changing[name] = asyncio.create_task(work)
            task.add_done_callback(lambda _: self._changing.pop(name, None))

    async def _add(self, name: str, model: t.Model, projects: frozenset[str], system: str | None) -> None:
        try:
            path = await asyncio.to_thread(self.service.artifacts.path, model.artifact)
            if model.whole:
                made = await asyncio.to_thread(self._alone, name, path)
                await self.models.host(replace(made, system=system, projects=projects, owned_by=model.project))
            else:
                await asyncio.to_thread(self.converted.note, name, path)
                await self.models.add(name, model.base, path, system=system, projects=projects, owned_by=model.project)
        except Exception as error:  # of the place where artifacts lie, or of the engine
            wait = min(max(self._failed.get(name, (0.0, 0.0))[1] * 2, AGAIN), LONGEST)
            self._failed[name] = (time.monotonic() + wait, wait)
            log.error("%s can't be served (%s); again in %g s", name, first_line(error), wait)
        else:
            self._there[name] = projects
            self._failed.pop(name, None)
            log.info("%s answers", name)

    def _alone(self, name: str, path: Path) -> Served:
        """A whole model, with an engine that has not started yet."""
        from tunesmith.models.load import load_renderer

        model = resolved(str(path))
        engine = self.engine.build(name, model)
        self.converted.note(name, path, getattr(engine, "precision", None))
        return Served(name, engine, load_renderer(model), root=str(path), identity=model.identity)

    async def _remove(self, name: str) -> None:
        self._there.pop(name, None)
        with contextlib.suppress(TunesmithError, Refused):
            await self.models.remove(name)
        await asyncio.to_thread(self.converted.forget, name)

    async def __aenter__(self) -> Registry:
        await self.sync()
        await asyncio.gather(*self._changing.values())
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._task, *self._changing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.sync()
            except Exception as error:  # the database may be away for a while
                log.warning("models were not looked at: %s", type(error).__name__)


class Converted:
    """GGUF files that an engine of this machine makes of tuned models, by name: weights too, which go with the model.

    They are noted in a file, since a model may be deleted while this server is not running.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lock = file, threading.Lock()
        try:
            self.names: dict[str, str] = json.loads(file.read_text())
        except (OSError, ValueError):
            self.names = {}

    def note(self, name: str, folder: Path, precision: str | None = None) -> None:
        """An engine is about to load an adapter; or, in a `precision`, a whole model."""
        from tunesmith.models.gguf_file import adapter_place, model_place

        with self._lock:
            self.names[name] = str(model_place(folder, precision) if precision else adapter_place(folder))
            write_json(self.file, self.names)

    def forget(self, name: str) -> None:
        with self._lock:
            kept = self.names.pop(name, None)
            if kept is not None:
                if kept not in self.names.values():
                    Path(kept).unlink(missing_ok=True)
                write_json(self.file, self.names)
