"""/v1/uploads: a large file in parts."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import time
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, File, Request, UploadFile
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.api import shapes
from tunesmith.api.auth import needs
from tunesmith.api.errors import ApiError
from tunesmith.api.files import FORM, Id, KeyFirst, Purpose, keep, plain_name, service_of, too_large
from tunesmith.jobs.artifacts import TooLarge, part_key
from tunesmith.jobs.service import Service
from tunesmith.store import ids
from tunesmith.store import tables as t
from tunesmith.store.audit import record

LARGEST_PART = 64 << 20
LASTS = 3600  # seconds
router = APIRouter(prefix="/v1/uploads", tags=["files"], route_class=KeyFirst)


def largest(state: Any) -> int:
    return min(LARGEST_PART, state.service.settings.max_upload) + FORM


class ExpiresAfter(BaseModel):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000)


class NewUpload(BaseModel):
    """What will come."""

    model_config = ConfigDict(extra="forbid")

    bytes: int = Field(ge=1)
    filename: str = Field(min_length=1, max_length=1024)
    mime_type: str = Field(max_length=255)
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class Complete(BaseModel):
    """The parts in order."""

    part_ids: list[str] = Field(min_length=1, max_length=10000)
    md5: str | None = None


@router.post("")
def create(request: Request, body: NewUpload, caller: Any = needs("runner", "files")) -> dict[str, Any]:
    service = service_of(request)
    if body.bytes > service.settings.max_upload:
        raise too_large(service.settings.max_upload)
    now = int(time.time())
    row = t.Upload(
        id=ids.new("upload_"),
        project=caller.project,
        key=caller.key,
        filename=plain_name(body.filename),
        purpose=body.purpose,
        mime_type=body.mime_type,
        bytes=body.bytes,
        status="pending",
        created_at=now,
        expires_at=now + LASTS,
        keep_for=body.expires_after.seconds if body.expires_after else None,
    )
    with service.store.write() as session:
        session.add(row)
        record(session, row.project, row.key, "upload.create", row.id, {"filename": row.filename, "bytes": row.bytes})
    return shapes.upload(row)


@router.post("/{id}/parts")
def add(
    request: Request, id: Id, data: Annotated[UploadFile, File()], caller: Any = needs("runner", "files")
) -> dict[str, Any]:
    """A part, of at most 64 MiB, in any order and at the same time as others."""
    service = service_of(request)
    row = _pending(service, id, caller.project)
    part = t.Part(id=ids.new("part_"), upload=id, created_at=int(time.time()))
    key = part_key(id, part.id)
    try:
        part.bytes, _ = service.artifacts.put(key, data.file, LARGEST_PART)
    except TooLarge:
        raise ApiError(413, "A part has at most 64 MiB.", param="data", code="part_too_large") from None
    try:
        with service.store.write() as session:
            waiting = sa.select(t.Upload.n).where(t.Upload.id == id, t.Upload.status == "pending").with_for_update()
            if session.scalar(waiting) is None:
                raise ApiError(400, f"Upload {id} takes no more parts.", param="upload_id")
            there = session.scalar(sa.select(sa.func.sum(t.Part.bytes)).where(t.Part.upload == id)) or 0
            if there + part.bytes > row.bytes:
                raise ApiError(
                    400, f"The parts have more than the {row.bytes:,} bytes that were announced.", param="data"
                )
            session.add(part)
    except BaseException:
        service.forget(key)
        raise
    return shapes.part(part)


@router.post("/{id}/complete")
def complete(request: Request, id: Id, body: Complete, caller: Any = needs("runner", "files")) -> dict[str, Any]:
    """Put the parts together, in the order given. Asked again, it answers with the same file."""
    service = service_of(request)
    row, earlier = _found(service, id, caller.project)
    if earlier is not None:
        return shapes.upload(row, earlier)
    _changed(service, row, "pending", "completing")
    try:
        made = _complete(service, row, body, caller.key)
    except BaseException:
        _changed(service, row, "completing", "pending")
        raise
    remove_parts(service, id)
    return shapes.upload(row, made)


def _complete(service: Service, row: t.Upload, body: Complete, key: str) -> t.File:
    id, now = row.id, int(time.time())
    with service.store.read() as session:
        parts = {p.id: p for p in session.scalars(sa.select(t.Part).where(t.Part.upload == id))}
    wrong = next((p for p in body.part_ids if p not in parts), None)
    if wrong is not None or len(set(body.part_ids)) < len(body.part_ids):
        raise ApiError(400, f"No such part: {wrong}" if wrong else "A part is named twice.", param="part_ids")
    count = sum(parts[p].bytes for p in body.part_ids)
    if count != row.bytes:
        raise ApiError(400, f"The parts have {count:,} bytes; {row.bytes:,} were announced.", param="part_ids")
    made = t.File(
        id=ids.new("file-"),
        project=row.project,
        key=key,
        filename=row.filename,
        purpose=row.purpose,
        status="processed",
        created_at=now,
        expires_at=now + row.keep_for if row.keep_for else None,
    )
    hash = hashlib.md5(usedforsecurity=False)
    with tempfile.TemporaryFile() as whole:
        for name in body.part_ids:
            with service.artifacts.open(part_key(id, name)) as file:
                while chunk := file.read(1 << 20):
                    hash.update(chunk)
                    whole.write(chunk)
        if body.md5 is not None and body.md5.lower() != hash.hexdigest():
            raise ApiError(400, "The md5 of the parts is another one.", param="md5", code="checksum_mismatch")
        whole.seek(0)
        keep(service, made, whole, service.settings.max_upload)
    _changed(service, row, "completing", "completed", file=made.id)
    return made


@router.post("/{id}/cancel")
def cancel(request: Request, id: Id, caller: Any = needs("runner", "files")) -> dict[str, Any]:
    service = service_of(request)
    row = _pending(service, id, caller.project)
    _changed(service, row, "pending", "cancelled", by=caller.key)
    remove_parts(service, id)
    return shapes.upload(row)


def remove_parts(service: Service, id: str) -> None:
    with contextlib.suppress(OSError):
        service.artifacts.delete(f"uploads/{id}")


def _changed(service: Service, row: t.Upload, old: str, new: str, by: str | None = None, **more: Any) -> None:
    """Change an upload's status, if it is still what it was.

    Raises:
        ApiError: 409: somebody else was faster.
    """
    asked = sa.update(t.Upload).where(t.Upload.id == row.id, t.Upload.status == old)
    with service.store.write() as session:
        if session.execute(asked.values(status=new, **more)).rowcount == 0:  # type: ignore[attr-defined]
            raise ApiError(409, f"Upload {row.id} was changed by another request.", param="upload_id", code="conflict")
        if by is not None:
            record(session, row.project, by, "upload.cancel", row.id)
    row.status = new


def _pending(service: Service, id: str, project: str) -> t.Upload:
    row, _ = _found(service, id, project)
    if row.status != "pending":
        raise ApiError(400, f"Upload {id} is {row.status}.", param="upload_id")
    return row


def _found(service: Service, id: str, project: str) -> tuple[t.Upload, t.File | None]:
    """An upload that can go on, or that is completed; then with its file.

    Raises:
        ApiError: 404, or 400: it has ended otherwise.
    """
    with service.store.read() as session:
        row = session.scalar(sa.select(t.Upload).where(t.Upload.id == id, t.Upload.project == project))
        if row is None:
            raise ApiError(404, f"No such Upload object: {id[:80]}", param="upload_id")
        file = session.scalar(sa.select(t.File).where(t.File.id == row.file)) if row.file else None
    if row.status == "pending" and row.expires_at <= time.time():
        _changed(service, row, "pending", "expired")
        remove_parts(service, id)
    if file is None and row.status not in ("pending", "completing"):
        raise ApiError(400, f"Upload {id} is {row.status}.", param="upload_id")
    return row, file
