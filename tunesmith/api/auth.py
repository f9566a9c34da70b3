"""Who is calling, and what they may do."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from tunesmith.api.errors import ApiError
from tunesmith.store.callers import Caller, Role

LOCAL = Caller("local", "default", "admin")


async def caller(request: Request) -> Caller:
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
            return Caller(f"key-{number}", "default", "admin")
    known_to = state.store.keys.caller if state.store is not None else None
    found: Caller | None = await run_in_threadpool(known_to, secret) if known_to else None
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


Called = Annotated[Caller, Depends(caller)]


def needs(role: Role, scope: str | None = None) -> Callable[..., Any]:
    """A dependency that gives the caller where it has this role or a higher one, and this scope.

    Raises:
        ApiError: 403: it has not.
    """

    async def allowed(found: Called) -> Caller:
        lacks = found.lacks(role, scope)
        if lacks:
            raise ApiError(403, f"Your key may not do this: it takes {lacks}.", code="insufficient_permissions")
        return found

    return Depends(allowed)
