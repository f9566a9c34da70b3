"""What answers look like, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Shape(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorDetail(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Shape):
    error: ErrorDetail


class Usage(Shape):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int | None = None


class ChatAnswer(Shape):
    role: str
    content: str | None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(Shape):
    index: int
    message: ChatAnswer
    finish_reason: str
    logprobs: dict[str, Any] | None = None


class ChatCompletion(Shape):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextChoice(Shape):
    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None = None


class Completion(Shape):
    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class Vector(Shape):
    object: str
    index: int
    embedding: list[float] | str


class Embeddings(Shape):
    object: str
    data: list[Vector]
    model: str
    usage: Usage


class ModelCard(Shape):
    id: str
    object: str
    created: int
    owned_by: str


class ModelList(Shape):
    object: str
    data: list[ModelCard]


# What any route may answer instead.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": says}
    for status, says in {
        400: "The request can't be answered as it is",
        401: "No key, or an unknown one",
        403: "The key may not do this",
        404: "There is no such thing",
        413: "The request is too large",
        429: "Too many requests or tokens; Retry-After says when to come again",
        503: "The engine is being started again; Retry-After says when to come again",
    }.items()
}
ERRORS[422] = {"model": ErrorBody, "description": "Not used"}
