"""Projects, people, keys, the audit log and webhooks. Paths are those of OpenAI's administration where it has them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from tunesmith.api import shapes
from tunesmith.api.auth import needs
from tunesmith.api.errors import ApiError
from tunesmith.api.files import Id, service_of
from tunesmith.errors import RunError
from tunesmith.jobs import webhooks
from tunesmith.store import ids
from tunesmith.store import tables as t
from tunesmith.store.audit import record
from tunesmith.store.keys import DEFAULT_PROJECT

router = APIRouter(prefix="/v1", tags=["administration"])
Admin = needs("admin", "admin")
Role = Literal["viewer", "runner", "admin"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewProject(Strict):
    name: str = Field(min_length=1, max_length=64)


class NewUser(Strict):
    name: str = Field(min_length=1, max_length=255)
    role: Role = "runner"


class NewKey(Strict):
    """What a key may do; see docs/service.md."""

    name: str = Field(min_length=1, max_length=255)
    role: Role = "runner"
    user: str | None = None
    scopes: list[str] = Field(default_factory=list, max_length=16)
    expires_at: int | None = Field(None, ge=0, le=2**40)
    rpm: int | None = Field(None, ge=1, le=2**31)
    token_quota: int | None = Field(None, ge=0, le=2**53)
    jobs_at_once: int | None = Field(None, ge=1, le=2**31)


class NewWebhook(Strict):
    url: str = Field(min_length=1, max_length=2048)
    events: list[str] = Field(default_factory=list, max_length=16)
    """All, if not given."""


def project(row: t.Project) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "organization.project",
        "name": row.name,
        "created_at": row.created_at,
        "status": "active",
        "archived_at": None,
    }


def user(row: t.User) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "organization.project.user",
        "name": row.name,
        "role": row.role,
        "project": row.project,
        "added_at": row.created_at,
    }


def key(row: t.Key) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "organization.project.api_key",
        "name": row.name,
        "redacted_value": row.hint,
        "role": row.role,
        "user": row.user,
        "project": row.project,
        "scopes": row.scopes,
        "rpm": row.rpm,
        "token_quota": row.token_quota,
        "tokens_used": row.tokens_used,
        "jobs_at_once": row.jobs_at_once,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "last_used_at": row.used_at,
    }


def webhook(row: t.Webhook) -> dict[str, Any]:
    return {"id": row.id, "object": "webhook", "url": row.url, "events": row.events, "created_at": row.created_at}


def whole(rows: list[Any], shape: Any) -> dict[str, Any]:
    return shapes.listed(rows, False, shape)


@router.post("/organization/projects")
def create_project(request: Request, body: NewProject, caller: Any = Admin) -> dict[str, Any]:
    _over_all(request, caller)
    return project(_ours(lambda: service_of(request).store.keys.create_project(body.name, caller.key)))


@router.get("/organization/projects")
def projects(request: Request, caller: Any = Admin) -> dict[str, Any]:
    rows = service_of(request).store.keys.projects()
    return whole(rows if _is_over_all(request, caller) else [r for r in rows if r.id == caller.project], project)


@router.post("/organization/projects/{id}/users")
def create_user(request: Request, id: Id, body: NewUser, caller: Any = Admin) -> dict[str, Any]:
    _within(request, caller, id)
    return user(_ours(lambda: service_of(request).store.keys.create_user(body.name, id, body.role, caller.key)))


@router.get("/organization/projects/{id}/users")
def users(request: Request, id: Id, caller: Any = Admin) -> dict[str, Any]:
    _within(request, caller, id)
    return whole(service_of(request).store.keys.users(id), user)


@router.delete("/organization/projects/{id}/users/{user_id}")
def delete_user(request: Request, id: Id, user_id: Id, caller: Any = Admin) -> dict[str, Any]:
    """Remove a person, and their keys with them."""
    _within(request, caller, id)
    count = service_of(request).store.keys.remove_user(user_id, id, caller.key)
    if count is None:
        raise ApiError(404, f"No such user: {user_id[:80]}", param="user_id")
    return {
        "id": user_id,
        "object": "organization.project.user.deleted",
        "deleted": True,
        "dependents": {"keys": count},
    }


@router.post("/organization/projects/{id}/api_keys")
def create_key(request: Request, id: Id, body: NewKey, caller: Any = Admin) -> dict[str, Any]:
    """A new key. `value` is the secret, which is shown this once. Who is held to scopes gives no others."""
    _within(request, caller, id)
    scopes = body.scopes or sorted(caller.scopes)
    if caller.scopes and (wider := sorted({*scopes} - caller.scopes)):
        lacks = f"Your key may not do this: it has not the scope {wider[0][:80]} itself."
        raise ApiError(403, lacks, param="scopes", code="insufficient_permissions")
    settings = body.model_dump() | {"scopes": tuple(scopes)}
    row, secret = _ours(lambda: service_of(request).store.keys.create(project=id, by=caller.key, **settings))
    return key(row) | {"value": secret}


@router.get("/organization/projects/{id}/api_keys")
def keys(request: Request, id: Id, caller: Any = Admin) -> dict[str, Any]:
    _within(request, caller, id)
    return whole(service_of(request).store.keys.every(id), key)


@router.delete("/organization/projects/{id}/api_keys/{key_id}")
def delete_key(request: Request, id: Id, key_id: Id, caller: Any = Admin) -> dict[str, Any]:
    _within(request, caller, id)
    if not service_of(request).store.keys.revoke(key_id, id, caller.key):
        raise ApiError(404, f"No such key: {key_id[:80]}", param="key_id")
    return {"id": key_id, "object": "organization.project.api_key.deleted", "deleted": True}


@router.get("/organization/audit_logs")
def audit(
    request: Request,
    since: Annotated[int | None, Query(ge=0, le=2**40)] = None,
    caller: Any = Admin,
) -> StreamingResponse:
    """Every change, oldest first, as JSON lines."""
    of = None if _is_over_all(request, caller) else caller.project

    def lines() -> Iterator[str]:
        for line in service_of(request).store.audit.export(of, since):
            yield json.dumps(line, ensure_ascii=False) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@router.post("/webhooks")
def create_webhook(request: Request, body: NewWebhook, caller: Any = Admin) -> dict[str, Any]:
    """Tell an address of the project's jobs. `secret` checks the signatures (Standard Webhooks), and is shown once."""
    service = service_of(request)
    unknown = next((event for event in body.events if event not in webhooks.EVENTS), None)
    if unknown is not None:
        raise ApiError(400, f"No event '{unknown[:80]}'. Events: {', '.join(webhooks.EVENTS)}.", param="events")
    try:
        webhooks.check_url(body.url, service.settings.private_webhooks)
    except webhooks.Forbidden as error:
        raise ApiError(400, f"The webhook's url {error}.", param="url", code="invalid_url") from None
    row = t.Webhook(
        id=ids.new("wh_"),
        project=caller.project,
        url=body.url,
        events=body.events,
        secret=webhooks.new_secret(),
        created_at=int(time.time()),
    )
    with service.store.write() as session:
        session.add(row)
        record(session, caller.project, caller.key, "webhook.create", row.id, {"url": row.url})
    return webhook(row) | {"secret": row.secret}


@router.get("/webhooks")
def list_webhooks(request: Request, caller: Any = Admin) -> dict[str, Any]:
    with service_of(request).store.read() as session:
        asked = sa.select(t.Webhook).where(t.Webhook.project == caller.project).order_by(t.Webhook.n)
        return whole(list(session.scalars(asked)), webhook)


@router.delete("/webhooks/{id}")
def delete_webhook(request: Request, id: Id, caller: Any = Admin) -> dict[str, Any]:
    with service_of(request).store.write() as session:
        row = session.scalar(sa.select(t.Webhook).where(t.Webhook.id == id, t.Webhook.project == caller.project))
        if row is None:
            raise ApiError(404, f"No such webhook: {id[:80]}", param="id")
        session.execute(sa.delete(t.Delivery).where(t.Delivery.webhook == id))
        session.delete(row)
        record(session, caller.project, caller.key, "webhook.delete", id)
    return {"id": id, "object": "webhook", "deleted": True}


def _is_over_all(request: Request, caller: Any) -> bool:
    """An admin of the default project looks after the whole server."""
    own = service_of(request).store.keys.project(caller.project)
    return own is not None and own.name == DEFAULT_PROJECT


def _over_all(request: Request, caller: Any) -> None:
    if not _is_over_all(request, caller):
        raise ApiError(403, "Only the server's admins may do this.", code="insufficient_permissions")


def _within(request: Request, caller: Any, id: str) -> None:
    """Raise unless the project is there and the caller looks after it."""
    own = id == caller.project
    if not own and not (_is_over_all(request, caller) and service_of(request).store.keys.project(id)):
        raise ApiError(404, f"No such project: {id[:80]}", param="project_id")


def _ours(make: Any) -> Any:
    try:
        return make()
    except RunError as error:
        raise ApiError(400, f"{error.what}. {error.fix or ''}".strip(), code="invalid_value") from None
