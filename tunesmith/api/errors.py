"""Everything that goes wrong, in the one shape that OpenAI's clients read:

{"error": {"message", "type", "param", "code"}}

What a request did wrong is a 400 that names the field; what we did wrong is a 500 that says nothing of our inside.
"""

from __future__ import annotations

import errno
import json
import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from tunesmith.errors import MachineError, TrainingError, TunesmithError
from tunesmith.inference.served import (
    EngineDown,
    EngineError,
    EngineFull,
    GrammarError,
    TooLong,
    UnknownAdapter,
    Unserved,
)
from tunesmith.serve.asked import Refused
from tunesmith.serve.local import too_long

log = logging.getLogger("tunesmith.api")
OURS = "The server had an error while processing your request. Its log tells more under this request's id."
TYPES = {401: "invalid_request_error", 403: "permission_error", 429: "rate_limit_exceeded"}


class ApiError(Exception):
    """What a client is told.

    Args:
        type: what kind of error it is; follows from the status if not given.
        param: the field or header to blame, as `messages.0.content`.
        code: a word for programs, such as model_not_found.
        headers: such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
        self.headers = dict(headers or {})
        self.more: dict[str, Any] = {}  # what else the error's object holds, beside the four keys

    def body(self) -> dict[str, Any]:
        told = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": told | self.more}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


TOO_LARGE = ApiError(413, "The request is larger than this server takes.", code="request_too_large")
TOO_SLOW = ApiError(408, "The request came too slowly.", code="request_timeout", headers={"connection": "close"})
PACKED = ApiError(
    415, "A body is read as it is: send it without Content-Encoding.", param="content-encoding", code="unsupported"
)


def told(error: Exception) -> ApiError:
    """What a client is told of any error."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return _of_fields(error.errors())
    if (away := _outside(error.__cause__ if isinstance(error, HTTPException) else error)) is not None:
        return away
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, ApiError):  # which came up while the body was read
            return error.__cause__
        return _unread(error.__cause__) if isinstance(error.__cause__, UNREAD) else _of_status(error)
    if isinstance(error, Refused):
        return ApiError(error.status, error.what, param=error.param, code=error.code, headers=_again(error.retry_after))
    if isinstance(error, EngineError):
        return _of_engine(error)
    if isinstance(error, MachineError | TrainingError):  # the server's own, whatever was asked
        log.error("the server failed", exc_info=error)
        return ApiError(500, OURS)
    if isinstance(error, TunesmithError):
        return ApiError(400, error.what)
    if isinstance(error, RecursionError):
        return _unread(error)
    log.error("unexpected error", exc_info=error)
    return ApiError(500, OURS)


UNREAD = (UnicodeDecodeError, RecursionError)


def _unread(error: BaseException) -> ApiError:
    return _not_json("it is nested too deep" if isinstance(error, RecursionError) else "it is not UTF-8")


def _not_json(why: str) -> ApiError:
    return ApiError(400, f"We could not parse the JSON body of your request: {why}.", code="invalid_json")


HALF = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]|\x00")  # what a lone surrogate can't be written without


async def whole_letters(request: Request) -> None:
    """Half of a letter (a lone surrogate) is in no text: JSON can spell it, no tokenizer, template or database can keep
    it. Of every route; the body has been read by then."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        return
    if HALF.search(await request.body()):
        try:
            json.dumps(await request.json(), ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _not_json("a text in it holds half of a letter (a lone surrogate)") from None
        except (ValueError, RecursionError):  # no JSON at all: told by whoever takes it
            return


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_full() -> ApiError:
    return ApiError(
        507, "The server's disk is full; nothing was kept.", code="disk_full", headers={"x-should-retry": "false"}
    )


def _outside(error: BaseException | None) -> ApiError | None:
    """What comes of where things are kept: a full disk, a database that is away or can't hold a value."""
    if isinstance(error, OSError) and error.errno in FULL:
        return disk_full()
    if type(error).__module__ == "sqlalchemy.exc" and type(error).__name__ == "DataError":
        return ApiError(400, "The request holds a value that can't be kept, such as a NUL.", code="invalid_value")
    if type(error).__module__ == "sqlalchemy.exc" and type(error).__name__ in ("OperationalError", "InterfaceError"):
        if "is full" in str(error):
            return disk_full()
        log.error("the database is away: %s", error)
        return ApiError(
            503,
            "The server's database can't be reached at the moment. Try again.",
            code="database_away",
            headers={"retry-after": "2"},
        )
    return None


def install(app: FastAPI) -> None:
    """Have every error answered in this shape. What no handler takes is caught by `frame.Frame`."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return told(error).response()

    for kind in (ApiError, RequestValidationError, HTTPException, TunesmithError):
        app.add_exception_handler(kind, answer)


def _of_fields(errors: Sequence[Any]) -> ApiError:
    """The first field that is wrong, by its path, and how many others are."""
    # Where a value may be of several kinds, what is told deepest inside it is what it was meant to be; or of the right
    # kind, and wrong otherwise.
    first = max(errors, key=lambda e: (len(_place(e["loc"])), not e["type"].endswith("_type")))
    if first["type"] == "json_invalid":
        why = (first.get("ctx") or {}).get("error", "it ends too early")
        return _not_json(why)
    if isinstance(first.get("input"), bytes) and first["loc"] == ("body",):
        message = "The body is read as JSON only under the header Content-Type: application/json."
        return ApiError(400, message, code="invalid_json")
    path = ".".join(str(part) for part in _place(first["loc"]))
    more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
    message = first["msg"].removeprefix("Value error, ")
    where = f"Invalid value for '{path or 'body'}'"
    return ApiError(400, f"{where}: {message}{more}.", param=path or None, code="invalid_value")


def _place(loc: Sequence[Any]) -> list[Any]:
    """A field's path without where it stood (body, query) and without the names of a union's members."""
    first, *rest = loc[1:] or [""]  # a field of a form may have brackets: expires_after[seconds]
    return [first, *(p for p in rest if isinstance(p, int) or not (p[:1].isupper() or "[" in p or p in UNION_PARTS))]


UNION_PARTS = {"str", "int", "float", "bool", "dict", "none"}


def _of_engine(error: EngineError) -> ApiError:
    if isinstance(error, EngineFull):
        message = "The engine is overloaded: as many requests wait as may. Try again later."
        return ApiError(429, message, code="engine_overloaded", headers=_again(error.retry_after))
    if isinstance(error, EngineDown):
        message = "The engine is being started again. Try again later."
        return ApiError(503, message, code="engine_unavailable", headers=_again(error.retry_after))
    if isinstance(error, TooLong):
        return told(too_long(error.context, error.prompt, 0))
    if isinstance(error, GrammarError):
        return ApiError(400, _sentence(error.what), param="response_format", code="invalid_schema")
    if isinstance(error, UnknownAdapter):
        return ApiError(404, "The model has just been unloaded.", param="model", code="model_not_found")
    if isinstance(error, Unserved):
        return ApiError(400, _sentence(error.what), code="unsupported")
    log.error("the engine failed", exc_info=error)
    return ApiError(500, OURS)


def _sentence(what: str) -> str:
    return f"{what[:1].upper()}{what[1:].rstrip('.')}."


def _again(seconds: int | None) -> dict[str, str]:
    return {} if seconds is None else {"retry-after": str(seconds)}


def _of_status(error: HTTPException) -> ApiError:
    if error.status_code == 404:
        return ApiError(404, "There is nothing at this address. The addresses: /docs", code="unknown_url")
    if error.status_code == 413:
        return TOO_LARGE
    phrase = error.detail if isinstance(error.detail, str) else HTTPStatus(error.status_code).phrase
    code = "method_not_allowed" if error.status_code == 405 else None
    return ApiError(error.status_code, f"{phrase}.".replace("..", "."), code=code, headers=error.headers)
