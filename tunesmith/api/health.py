"""Whether the server lives, whether it can answer, and its figures."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from tunesmith.api.auth import caller
from tunesmith.api.errors import ApiError

router = APIRouter(tags=["health"])


@router.get("/health")
async def health(request: Request) -> dict[str, Any]:
    """The process answers; and what its engines do."""
    serving = request.app.state.tunesmith.serving
    return {"status": "ok", "engines": serving.models.health() if serving else {}}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """200 where every engine can answer, 503 where one can't or the server is about to stop."""
    state = request.app.state.tunesmith
    engines = state.serving.models.health() if state.serving else {}
    able = all(health == "ready" for health in engines.values()) and not state.stopping
    return JSONResponse({"ready": able, "engines": engines}, 200 if able else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus. They take a key where the server has keys, with a database one of an admin of the
    server, since they name the models of all; none if `serve.open_metrics` is set."""
    state = request.app.state.tunesmith
    if not state.settings.open_metrics:
        found = await caller(request)
        if state.store is not None and found.project != "default":
            own = await run_in_threadpool(state.store.keys.project, found.project)
            if found.lacks("admin") or own is None or own.name != "default":
                raise ApiError(403, "Only the server's admins may do this.", code="insufficient_permissions")
    return Response(state.serving.metrics.text(state.serving.models.engines), media_type="text/plain; version=0.0.4")
