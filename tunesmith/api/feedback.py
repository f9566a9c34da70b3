"""POST /v1/feedback: what people say of answers."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from tunesmith.api.auth import needs
from tunesmith.api.bodies import FeedbackBody
from tunesmith.api.errors import ApiError
from tunesmith.api.schemas import ERRORS

router = APIRouter(tags=["feedback"])


@router.post("/v1/feedback", responses=ERRORS)
async def feedback(body: FeedbackBody, request: Request, who: Any = needs("runner", "feedback")) -> dict[str, Any]:
    """A rating from -1 to 1, a better answer or a comment, on an answer by its id (chatcmpl-...)."""
    state = request.app.state.tunesmith
    if state.traffic is None:
        raise ApiError(400, "This server keeps no answers: it was started without a database.", code="no_database")
    said = await state.traffic.feedback(
        body.id, project=who.project, key=who.key, rating=body.rating, correction=body.correction, comment=body.comment
    )
    if said is None:
        raise ApiError(404, f"There is no answer '{body.id}', or it is older than what is kept.", param="id")
    return {"id": said, "object": "feedback", "answer": body.id}
