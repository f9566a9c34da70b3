"""Who is calling, and what they may do."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Callable
from typing import Annotated, Any
from urllib.parse import urlsplit

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
            _of_this_machine(request)
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


def _of_this_machine(request: Request) -> None:
    """Programs of this machine are let in without a key; pages that its browsers show are not.

    Raises:
        ApiError: 403: the request is for a name that only looks like this machine, or comes from another site's page.
    """
    host = request.headers.get("host", "")
    name = urlsplit(f"//{host}").hostname or ""
    own = (request.scope.get("server") or ("",))[0]  # the address that the connection came to
    if not (is_local(name) or name.endswith(".localhost") or name == own):
        raise ApiError(
            403, f"Without keys this server answers to localhost only, not to '{name[:100]}'.", code="foreign_host"
        )
    origin, allowed = request.headers.get("origin"), request.app.state.tunesmith.settings.cors
    if "*" in allowed or origin in allowed:
        return
    site = request.headers.get("sec-fetch-site", "none")
    if site not in ("none", "same-origin") or (origin is not None and urlsplit(origin).netloc != host):
        raise ApiError(
            403,
            "Without keys this server answers no pages of other sites. Let them in: serve.cors, or give it a key.",
            code="foreign_origin",
        )


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
