"""Tuned models: they answer on this server while they are in the database, and are deleted for good."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import sqlalchemy as sa
from fastapi import APIRouter, Request

from tunesmith.api.auth import needs
from tunesmith.api.errors import ApiError
from tunesmith.api.files import service_of
from tunesmith.errors import TunesmithError
from tunesmith.jobs import board
from tunesmith.jobs.service import Service
from tunesmith.serve.models import Models
from tunesmith.store import tables as t
from tunesmith.store.audit import record

router = APIRouter(prefix="/v1/models", tags=["models"])
log = logging.getLogger("tunesmith.api")
AGAIN = 30.0  # seconds before a model that could not be loaded is tried again
EVERY = 0.5  # seconds between looks at the database


@router.delete("/{model:path}")
async def delete(request: Request, model: str, caller: Any = needs("admin", "models")) -> dict[str, Any]:
    """Delete a tuned model, its weights too. `dependents` names the jobs that began from it."""
    service = service_of(request)
    told = await asyncio.to_thread(_delete, service, model, caller)
    registry = request.app.state.tunesmith.registry
    if registry is not None:
        await registry.sync()
    return told


def _delete(service: Service, name: str, caller: Any) -> dict[str, Any]:
    with service.store.write() as session:
        model = session.scalar(sa.select(t.Model).where(t.Model.id == name, t.Model.project == caller.project))
        if model is None:
            raise ApiError(404, f"The model '{name[:200]}' does not exist.", param="model", code="model_not_found")
        jobs = list(session.scalars(sa.select(t.Job).where(t.Job.model == name).order_by(t.Job.n)))
        active = [job.id for job in jobs if job.status not in board.FINAL]
        if active:
            raise ApiError(
                400,
                f"Model {name} is trained on by {', '.join(active[:5])}; cancel that first.",
                param="model",
                code="model_in_use",
            )
        session.execute(sa.delete(t.Permission).where(t.Permission.model == name))
        session.execute(sa.delete(t.Checkpoint).where(t.Checkpoint.model == name))
        session.execute(sa.delete(t.Model).where(t.Model.id == name))
        service.forget(model.artifact)
        depend = [job.id for job in jobs]
        record(session, caller.project, caller.key, "model.delete", name, {"jobs": depend})
    return {"id": name, "object": "model", "deleted": True, "dependents": {"jobs": depend}}


class Registry:
    """Keeps what answers in step with the database: models that jobs make appear, deleted ones go. While entered, it
    looks every half second."""

    def __init__(self, service: Service, models: Models) -> None:
        self.service, self.models = service, models
        self._there: dict[str, frozenset[str]] = {}
        self._lock = asyncio.Lock()
        self._failed: dict[str, float] = {}  # when each could not be loaded

    async def sync(self) -> None:
        """Bring the served models up to date."""
        async with self._lock:
            wanted, allowed, systems = await asyncio.to_thread(self._read)
            for name in self._there.keys() - wanted.keys():
                del self._there[name]
                with contextlib.suppress(TunesmithError):
                    await self.models.remove(name)
            for name, model in wanted.items():
                projects = frozenset({model.project, *allowed.get(name, ())})
                if name not in self._there and time.monotonic() > self._failed.get(name, -AGAIN) + AGAIN:
                    await self._add(name, model, projects, systems.get(model.job))
                elif self._there.get(name, projects) != projects:
                    self.models.share(name, projects)
                    self._there[name] = projects

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

    async def _add(self, name: str, model: t.Model, projects: frozenset[str], system: str | None) -> None:
        try:
            path = await asyncio.to_thread(self.service.artifacts.path, model.artifact)
            await self.models.add(name, model.base, path, system=system, projects=projects, owned_by=model.project)
            self._there[name] = projects
            log.info("%s answers", name)
        except (TunesmithError, OSError) as error:
            log.error("%s can't be served: %s", name, error)
            self._failed[name] = time.monotonic()

    async def __aenter__(self) -> Registry:
        await self.sync()
        self._task = asyncio.create_task(self._follow())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.sync()
            except Exception as error:  # the database may be away for a while
                log.warning("models were not looked at: %s", type(error).__name__)
