"""What is left of jobs that are over and of models that were deleted, removed from artifacts and from this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

import sqlalchemy as sa

from tunesmith.jobs.artifacts import file_key
from tunesmith.jobs.board import FINAL
from tunesmith.jobs.service import Service
from tunesmith.store.tables import File, Job, Model

EVERY = 600.0  # seconds between looks


def sweep(service: Service) -> None:
    """Look at everything: runs of this machine and those kept for others, models, this machine's cache."""
    here, kept = [path for path in _inside(service.runs) if path.is_dir()], service.artifacts.names("runs")
    with service.store.read() as session:  # after the look, so that what is new is not taken for old
        active = set(session.scalars(sa.select(Job.id).where(Job.status.not_in(FINAL))))
        over = set(session.scalars(sa.select(Job.id).where(Job.status.in_(FINAL))))
    for path in here:
        if path.name not in active:
            shutil.rmtree(path, ignore_errors=True)
    for name in kept:
        if name.removesuffix(".tar") in over:  # what is of no job here may be another service's
            service.forget(f"runs/{name}")
    for job in over.intersection(service.artifacts.names("models")):
        models(service, job)
    _cache(service)


def models(service: Service, job: str) -> None:
    """Remove models of a job that is over which are not in the database: it was cancelled, or held by its gate."""
    there = {f"models/{job}/{name}" for name in service.artifacts.names(f"models/{job}")}
    with service.store.read() as session:
        if not there or session.scalar(sa.select(Job.n).where(Job.id == job, Job.status.not_in(FINAL))) is not None:
            return
        known = set(session.scalars(sa.select(Model.artifact).where(Model.artifact.in_(there))))
    service.forget(*(there - known))


def _cache(service: Service) -> None:
    """Remove what was fetched to this machine and then deleted, maybe by another one."""
    cache = service.artifacts.cache
    there = [path for folder in (cache / "files", *_inside(cache / "models")) for path in _inside(folder)]
    with service.store.read() as session:
        known = {file_key(id) for id in session.scalars(sa.select(File.id))}
        known |= set(session.scalars(sa.select(Model.artifact)))
    for path in there:
        key = path.relative_to(cache).as_posix()
        if key not in known and not path.name.startswith("."):
            service.artifacts.uncache(key)


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
