"""Rows of the database as OpenAI's objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tunesmith.api.errors import ApiError
from tunesmith.jobs.board import FINAL

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from tunesmith.store.tables import Checkpoint, Event, File, Job, Part, Permission, Upload


def file(row: File) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.bytes,
        "created_at": row.created_at,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "status_details": row.status_details,
        "expires_at": row.expires_at,
    }


def upload(row: Upload, made: File | None = None) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "upload",
        "bytes": row.bytes,
        "created_at": row.created_at,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": row.status,
        "expires_at": row.expires_at,
        "file": file(made) if made is not None else None,
    }


def part(row: Part) -> dict[str, Any]:
    return {"id": row.id, "object": "upload.part", "created_at": row.created_at, "upload_id": row.upload}


def job(row: Job) -> dict[str, Any]:
    """Every key is there, and those that strict clients want are never null."""
    return {
        "id": row.id,
        "object": "fine_tuning.job",
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "model": row.model,
        "fine_tuned_model": row.fine_tuned_model,
        "organization_id": row.project,
        "status": row.status,
        "training_file": row.training_file,
        "validation_file": row.validation_file,
        "result_files": row.result_files,
        "hyperparameters": row.hyperparameters,
        "method": row.method,
        "seed": row.seed,
        "trained_tokens": row.trained_tokens,
        "estimated_finish": row.estimated_finish,
        "error": row.error,
        "integrations": row.integrations,
        "metadata": row.info or None,
        "user_provided_suffix": row.suffix,
        "usage_metrics": None,
        "shared_with_openai": False,
    }


def event(row: Event) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.event",
        "created_at": row.created_at,
        "level": row.level,
        "message": row.message,
        "type": row.type,
        "data": row.data,
    }


def checkpoint(row: Checkpoint) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": row.created_at,
        "fine_tuned_model_checkpoint": row.model,
        "fine_tuning_job_id": row.job,
        "step_number": row.step,
        "metrics": row.metrics,
    }


def permission(row: Permission) -> dict[str, Any]:
    return {"id": row.id, "object": "checkpoint.permission", "created_at": row.created_at, "project_id": row.project}


def keepable(value: Any, path: str = "") -> None:
    """Look for what a database can't keep, in a body.

    Raises:
        ApiError: 400: a text holds NUL or half a letter, or a number is not finite.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            keepable(str(key), path)
            keepable(inner, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            keepable(inner, f"{path}.{number}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ApiError(400, f"'{path}' is not a finite number.", param=path, code="invalid_value")
    elif isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        what = "holds NUL or half a letter, which can't be kept"
        raise ApiError(400, f"A text in '{path}' {what}.", param=path or None, code="invalid_value")


def unused(jobs: Sequence[Job], used: str, param: str, code: str) -> list[str]:
    """The ids of jobs that used something which is to be deleted.

    Args:
        used: what it is and how it was used, as in "File file-1 is used".

    Raises:
        ApiError: 400: some of them are not over.
    """
    if active := [job.id for job in jobs if job.status not in FINAL]:
        raise ApiError(400, f"{used} by {', '.join(active[:5])}; cancel that first.", param=param, code=code)
    return [job.id for job in jobs]


def page(
    session: Session, asked: sa.Select[Any], table: Any, after: str | None, limit: int, newest: bool = True
) -> tuple[Sequence[Any], bool]:
    """A page of rows after a row's id, and whether there are more. After one that is not among them, there are none:
    it may have been deleted since the page before."""
    if after is not None:
        place = session.scalar(asked.with_only_columns(table.n).where(table.id == after))
        if place is None:
            return [], False
        asked = asked.where(table.n < place if newest else table.n > place)
    rows = list(session.scalars(asked.order_by(table.n.desc() if newest else table.n).limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def listed(rows: Sequence[Any], more: bool, shape: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A page in OpenAI's shape."""
    ids = [row.id for row in rows]
    return {
        "object": "list",
        "data": [shape(row) for row in rows],
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": more,
    }
