"""The models that answer: listed, and adapters loaded and unloaded while others answer, as vLLM has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse

from tunesmith.api.auth import Called, needs
from tunesmith.api.bodies import LoadBody, UnloadBody
from tunesmith.api.errors import ApiError
from tunesmith.api.schemas import ERRORS, ModelCard, ModelList
from tunesmith.errors import ModelError
from tunesmith.serve.models import Models, Served, unknown
from tunesmith.store.callers import Caller

router = APIRouter(tags=["models"])


@router.get("/v1/models", response_model=ModelList, responses=ERRORS)
async def models(request: Request, who: Called) -> Any:
    """All models that this key may ask, and the names of routes."""
    _may_look(who)
    serving = request.app.state.tunesmith.serving
    found = [_shown(request, served) for served in serving.models if served.visible(who.project)]
    return {"object": "list", "data": found + [_route(name) for name in serving.routes]}


@router.get("/v1/models/{model:path}", response_model=ModelCard, responses=ERRORS)
async def model(model: str, request: Request, who: Called) -> Any:
    """One model."""
    _may_look(who)
    serving = request.app.state.tunesmith.serving
    return _route(model) if model in serving.routes else _shown(request, serving.models.get(model, who.project))


def _may_look(who: Caller) -> None:
    """Raise unless a key is for models, or for asking them."""
    if (lacks := who.lacks("viewer", "models")) and who.lacks("viewer", "chat"):
        raise ApiError(403, f"Your key may not do this: it takes {lacks}.", code="insufficient_permissions")


def _shown(request: Request, served: Served) -> dict[str, Any]:
    """A model as it is listed; a service does not tell where it lies."""
    hidden = {"root": served.name} if request.app.state.tunesmith.service is not None else {}
    return served.as_dict() | hidden


def _route(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "route"}


@router.post("/v1/load_lora_adapter", responses=ERRORS)
async def load_lora_adapter(body: LoadBody, request: Request, who: Any = needs("admin", "models")) -> PlainTextResponse:
    """Have an adapter answer under a name. Its base must be served; requests go on meanwhile."""
    models = _ours(request)
    base = body.base_model_name or next((s.name for s in models if s.adapter is None), "")
    path = Path(body.lora_path)
    if not (path / "adapter_config.json").is_file():
        raise ApiError(400, f"There is no adapter in '{body.lora_path}' on the server.", param="lora_path")
    if body.load_inplace and body.lora_name in models:
        await models.remove(body.lora_name)
    try:
        await models.add(body.lora_name, base, path)
    except ModelError as error:
        raise ApiError(400, f"The adapter can't be loaded: {error.what}.", param="lora_path") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", responses=ERRORS)
async def unload_lora_adapter(
    body: UnloadBody, request: Request, who: Any = needs("admin", "models")
) -> PlainTextResponse:
    """Have an adapter answer no more. Requests that use it end first."""
    models = _ours(request)
    if body.lora_name not in models or models.get(body.lora_name, who.project).adapter is None:
        raise unknown(body.lora_name, [s.name for s in models if s.adapter is not None])
    await models.remove(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _ours(request: Request) -> Models:
    """The models of a server of one's own.

    Raises:
        ApiError: 403: a service's models belong to projects, and come and go by their jobs.
    """
    state = request.app.state.tunesmith
    if state.service is not None:
        what = "Here models come of jobs, and go by DELETE /v1/models/{model}; adapters are not loaded by hand."
        raise ApiError(403, what, code="unsupported")
    models: Models = state.serving.models
    return models
