"""Who is calling, and what they may do."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from tunesmith.api.errors import ApiError

ROLES = ("viewer", "runner", "admin")


@dataclass(frozen=True)
class Caller:
    """Who calls: a key, its project, and what it may do.

    Attributes:
        key: the key's id, never the key itself.
        role: viewer (reads), runner (asks models, trains), admin (everything).
        scopes: what the key is held to; everything that its role may, where it is empty.
        rpm, token_quota: requests a minute and tokens a day; None is no limit but the server's.
    """

    key: str
    project: str = "default"
    role: str = "admin"
    scopes: frozenset[str] = frozenset()
    rpm: int | None = None
    token_quota: int | None = None


LOCAL = Caller("local")


async def caller(request: Request) -> Any:
    """The caller of a request, by its Bearer key.

    Where the server has neither keys nor a store, everybody on this machine is let in, and nobody else.

    Raises:
        ApiError: 401: there is no key, or it is not known.
    """
    state = request.app.state.tunesmith
    secret = _secret(request)
    if not state.keys and state.store is None:
        if state.local:
            return LOCAL
        raise ApiError(401, "This server has no keys yet, so it only answers on its own machine.", code="no_keys")
    if not secret:
        raise ApiError(
            401,
            "You didn't provide an API key. Give it in the header Authorization: Bearer YOUR_KEY.",
            code="invalid_api_key",
        )
    for number, known in enumerate(state.keys):
        if hmac.compare_digest(known.encode(), secret.encode()):
            return Caller(f"key-{number}")
    found = await run_in_threadpool(state.store.keys.caller, secret) if state.store is not None else None
    if found is None:
        raise ApiError(401, f"Incorrect API key provided: {_shown(secret)}.", code="invalid_api_key")
    request.state.about["key"] = found.key
    return found


def _secret(request: Request) -> str:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else ""


def _shown(secret: str) -> str:
    """As much of a wrong key as helps to find it."""
    return f"{secret[:3]}...{secret[-4:]}" if len(secret) > 12 else "..."


Called = Annotated[Any, Depends(caller)]


def needs(role: str, scope: str | None = None) -> Callable[..., Any]:
    """A dependency that gives the caller where it has this role or a higher one, and this scope.

    Raises:
        ApiError: 403: it has not.
    """

    async def allowed(found: Called) -> Any:
        if ROLES.index(found.role) < ROLES.index(role):
            raise ApiError(403, f"Your key may not do this: it takes the role {role}.", code="insufficient_permissions")
        if scope is not None and found.scopes and scope not in found.scopes:
            raise ApiError(
                403, f"Your key may not do this: it lacks the scope {scope}.", code="insufficient_permissions"
            )
        return found

    return Depends(allowed)
