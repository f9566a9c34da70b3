"""What lies around every request: its id, a last net for errors, and a line in the log without any text of it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.api.errors import PACKED, TOO_LARGE, TOO_SLOW, told

access = logging.getLogger("tunesmith.access")
GIVEN = re.compile(r"[\w.-]{1,64}")
PATIENCE = 30.0  # seconds for a head to come, and for a body; one more for each RATE bytes of a body
RATE = 1024


class Frame:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, size = time.perf_counter(), 0, 0
        request_id = _given(scope) or f"req_{uuid.uuid4().hex}"
        about: dict[str, Any] = {}  # what a route adds to the log's line: model, tokens, key
        scope.setdefault("state", {}).update(request_id=request_id, about=about)

        async def framed(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                if message["status"] == 413 and status == 0 and _plain(message):
                    return None  # of the body's limit, which knows nothing of our shape
                status = message["status"]
                own = {
                    "x-request-id": request_id,
                    "openai-processing-ms": str(round((time.perf_counter() - began) * 1000)),
                    "x-content-type-options": "nosniff",
                }
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in own.items())]
            else:
                if status == 0:
                    return await TOO_LARGE.response()(scope, receive, framed)
                size += len(message.get("body", b""))
            return await send(message)

        try:
            if any(name == b"content-encoding" and value != b"identity" for name, value in scope["headers"]):
                raise PACKED
            await self.app(scope, _in_time(receive), framed)
        except (asyncio.CancelledError, ClientDisconnect):  # the client has gone, or the server goes
            status = status or 499
            raise
        except Exception as error:
            if status:  # the answer had begun: nothing can be told any more
                raise
            await told(error).response()(scope, receive, framed)
        finally:
            line = {
                "request": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status or 499,
                "ms": round((time.perf_counter() - began) * 1000, 1),
                "bytes": size,
                "client": (scope.get("client") or ("",))[0],
            }
            access.info(json.dumps(line | about))


def _in_time(receive: Receive) -> Receive:
    """What is received, as long as the body comes at a fair pace: whoever sends a byte now and then holds nothing."""
    began, size, whole = asyncio.get_running_loop().time(), 0, False

    async def received() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout_at(began + PATIENCE + size / RATE):
                message = await receive()
        except TimeoutError:
            raise TOO_SLOW from None
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        return message

    return received


def _plain(message: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/plain") for name, value in message["headers"])


def _given(scope: Scope) -> str | None:
    """The id that a proxy in front gave the request."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and GIVEN.fullmatch(found := value.decode("latin-1")):
            return found
    return None
