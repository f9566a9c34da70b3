"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import math
import secrets
import struct
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from tunesmith.api.answering import Json, admit, guarded, spend, until_gone
from tunesmith.api.auth import needs
from tunesmith.api.bodies import EmbeddingBody, prompts
from tunesmith.api.errors import ApiError
from tunesmith.api.schemas import ERRORS, Embeddings

router = APIRouter(tags=["embeddings"])


@router.post("/v1/embeddings", response_model=Embeddings, responses=ERRORS)
async def embeddings(body: EmbeddingBody, request: Request, who: Any = needs("runner", "chat")) -> Response:
    """Vectors of texts, each of length 1: the mean of the model's last states."""
    await admit(request, who)
    state, began = request.app.state.tunesmith, time.perf_counter()
    asked = state.serving.embed(body.model, prompts(body.input), who.project)
    vectors, tokens, flags = await until_gone(request, asked)
    spend(state, who.key, tokens)
    request.state.about.update(model=body.model[:200], prompt_tokens=tokens)
    if state.settings.log_text:
        request.state.about["asked"] = {"input": body.input}
    if state.traffic is not None:
        state.traffic.add(
            {},
            {},
            id=f"emb-{secrets.token_hex(12)}",
            endpoint="embeddings",
            model=body.model,
            project=who.project,
            key=who.key,
            user=body.user[:255] if body.user else None,
            status=200,
            prompt_tokens=tokens,
            completion_tokens=0,
            seconds=time.perf_counter() - began,
            flags=sorted(set(flags)),
        )
    if body.dimensions is not None:
        vectors = [_cut(v, body.dimensions) for v in vectors]
    form = _base64 if body.encoding_format == "base64" else list
    data = [{"object": "embedding", "index": i, "embedding": form(v)} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Json({"object": "list", "data": data, "model": body.model, "usage": usage}, headers=guarded(flags))


def _cut(vector: list[float], size: int) -> list[float]:
    """Its first numbers, of length 1 again."""
    if size > len(vector):
        raise ApiError(400, f"This model's vectors have {len(vector)} dimensions.", param="dimensions")
    kept = vector[:size]
    length = math.hypot(*kept) or 1.0
    return [x / length for x in kept]


def _base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
