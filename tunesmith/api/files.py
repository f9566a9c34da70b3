"""/v1/files: what jobs learn from, and what they leave."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, File, Form, Path, Query, Request, UploadFile
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute

from tunesmith.api import shapes
from tunesmith.api.auth import caller as caller_of
from tunesmith.api.auth import needs
from tunesmith.api.errors import ApiError
from tunesmith.jobs.artifacts import TooLarge, file_key
from tunesmith.jobs.results import encoded
from tunesmith.jobs.rows import check, lines_of
from tunesmith.store import ids
from tunesmith.store import tables as t
from tunesmith.store.audit import record

if TYPE_CHECKING:
    from tunesmith.jobs.service import Service


class KeyFirst(APIRoute):
    """A route that looks at the key before it reads the body, so that nobody without one fills the disk."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            await caller_of(request)
            return await handle(request)

        return checked


router = APIRouter(prefix="/v1", tags=["files"], route_class=KeyFirst)
FORM = 1 << 20  # bytes of a form beside its file
Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]
SHOWN_PROBLEMS = 100
Id = Annotated[str, Path(max_length=255)]
RESULT_TYPE = "application/octet-stream"  # never what a browser would show


def largest(state: Any) -> int:
    most: int = state.service.settings.max_file
    return most + FORM


def service_of(request: Request) -> Service:
    found: Service = request.app.state.tunesmith.service
    return found


@router.post("/files")
def create(
    request: Request,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[Purpose, Form()],
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2592000)] = None,
    caller: Any = needs("runner", "files"),
) -> dict[str, Any]:
    """Upload a file. One to train on is looked at, row by row, before it is taken."""
    service = service_of(request)
    if (anchor is None) != (seconds is None):
        raise ApiError(400, "expires_after needs both 'anchor' and 'seconds'.", param="expires_after")
    row = t.File(
        id=ids.new("file-"),
        project=caller.project,
        key=caller.key,
        filename=plain_name(file.filename),
        purpose=purpose,
        status="processed",
        created_at=int(time.time()),
        expires_at=int(time.time()) + seconds if seconds else None,
    )
    keep(service, row, file.file, service.settings.max_file)
    return shapes.file(row)


def keep(service: Service, row: t.File, content: IO[bytes], most: int) -> None:
    """Take a file: its rows looked at, its bytes kept, its row written.

    Raises:
        ApiError: it is too large, empty or has unusable rows, or the disk is full. Nothing is kept then.
    """
    if row.purpose == "fine-tune":
        content.seek(0, 2)
        if content.tell() > most:
            raise too_large(most)
        content.seek(0)
        inspect(row, content)
        content.seek(0)
    try:
        row.bytes, row.sha256 = service.artifacts.put(file_key(row.id), content, most)
    except TooLarge:
        raise too_large(most) from None
    try:
        if row.bytes == 0:
            raise ApiError(400, "The file is empty.", param="file", code="empty_file")
        with service.store.write() as session:
            session.add(row)
            record(session, row.project, row.key, "file.create", row.id, {"filename": row.filename, "bytes": row.bytes})
    except BaseException:
        service.forget(file_key(row.id))
        raise


def inspect(row: t.File, content: IO[bytes]) -> None:
    """Look at every row of a training file.

    Raises:
        ApiError: some can't be used; `error.problems` has each with its line.
    """
    found = check(lines_of(content))
    row.kind, row.rows = found.kind, found.rows
    if found.wrong:
        error = ApiError(400, found.told(), param="file", code="invalid_file_format")
        error.more = {"problems": [p.as_dict() for p in found.problems[:SHOWN_PROBLEMS]], "wrong": found.wrong}
        raise error


def too_large(most: int) -> ApiError:
    return ApiError(
        413, f"The file is larger than the {most:,} bytes that are allowed.", param="file", code="file_too_large"
    )


def plain_name(name: str | None) -> str:
    """A client's file name without folders or control characters: it is shown, and never used as a path."""
    last = re.split(r"[/\\]", name or "")[-1]
    return re.sub(r"[\x00-\x1f\x7f]", "", last)[:255].strip(". ") or "upload"


@router.get("/files")
def list_files(
    request: Request,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    caller: Any = needs("viewer", "files"),
) -> dict[str, Any]:
    """The project's files."""
    asked = sa.select(t.File).where(t.File.project == caller.project, *_alive())
    if purpose is not None:
        asked = asked.where(t.File.purpose == purpose)
    with service_of(request).store.read() as session:
        return shapes.listed(*shapes.page(session, asked, t.File, after, limit, order == "desc"), shapes.file)


@router.get("/files/{id}")
def retrieve(request: Request, id: Id, caller: Any = needs("viewer", "files")) -> dict[str, Any]:
    return shapes.file(found(service_of(request), id, caller.project))


@router.get("/files/{id}/content")
def content(
    request: Request,
    id: Id,
    raw: Annotated[bool, Query(description="A result file as plain CSV instead of base64.")] = False,
    caller: Any = needs("viewer", "files"),
) -> Response:
    """The bytes. A job's results are base64 of CSV, as OpenAI's are."""
    service = service_of(request)
    row = found(service, id, caller.project)
    headers = {"Content-Disposition": f'attachment; filename="{row.id}"'}
    if row.purpose == "fine-tune-results" and not raw:
        with service.artifacts.open(file_key(row.id)) as file:
            return Response(encoded(file.read()), media_type=RESULT_TYPE, headers=headers)

    def chunks() -> Iterator[bytes]:
        with service.artifacts.open(file_key(row.id)) as file:
            while chunk := file.read(1 << 20):
                yield chunk

    return StreamingResponse(chunks(), media_type=RESULT_TYPE, headers=headers | {"Content-Length": str(row.bytes)})


@router.delete("/files/{id}")
def delete(request: Request, id: Id, caller: Any = needs("runner", "files")) -> dict[str, Any]:
    """Remove a file, its bytes too. `dependents` names the jobs that used it; one that still does keeps it."""
    service = service_of(request)
    row = found(service, id, caller.project)
    with service.store.write() as session:
        if session.scalar(sa.select(t.File.n).where(t.File.id == id).with_for_update()) is None:
            raise _none(id)
        uses = sa.or_(t.Job.training_file == id, t.Job.validation_file == id)
        jobs = list(session.scalars(sa.select(t.Job).where(t.Job.project == caller.project, uses).order_by(t.Job.n)))
        depend = shapes.unused(jobs, f"File {id} is used", "file_id", "file_in_use")
        models = [job.fine_tuned_model for job in jobs if job.fine_tuned_model]
        session.execute(sa.delete(t.File).where(t.File.id == id))
        record(session, caller.project, caller.key, "file.delete", id, {"jobs": depend, "models": models})
    service.forget(file_key(row.id))
    return {"id": id, "object": "file", "deleted": True, "dependents": {"jobs": depend, "models": models}}


def found(service: Service, id: str, project: str) -> t.File:
    """A file of the project.

    Raises:
        ApiError: 404.
    """
    with service.store.read() as session:
        row = session.scalar(sa.select(t.File).where(t.File.id == id, t.File.project == project, *_alive()))
    if row is None:
        raise _none(id)
    return row


def _none(id: str) -> ApiError:
    return ApiError(404, f"No such File object: {id[:80]}", param="id")


def _alive() -> list[Any]:
    return [sa.or_(t.File.expires_at.is_(None), t.File.expires_at > int(time.time()))]
