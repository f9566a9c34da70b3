"""Pages: a chat at /, the API's documentation at /docs. Everything they need comes from this server."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from starlette.responses import Response

from tunesmith.api.errors import ApiError

router = APIRouter(include_in_schema=False)
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
ASSETS = ("page.css", "chat.js", "docs.js")
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page(name: str) -> Response:
    """A file of the package."""
    content = (files("tunesmith.api") / "assets" / name).read_bytes()
    return Response(content, media_type=f"{KINDS[name.rpartition('.')[2]]}; charset=utf-8", headers=HEADERS)


@router.get("/")
async def chat() -> Response:
    return page("chat.html")


@router.get("/docs")
async def docs() -> Response:
    return page("docs.html")


@router.get("/assets/{name}")
async def asset(name: str) -> Response:
    if name not in ASSETS:
        raise ApiError(404, "There is no such file.")
    return page(name)
