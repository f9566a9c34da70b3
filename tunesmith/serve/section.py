"""`serve`: how models answer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tunesmith import plugins
from tunesmith.section import Section


class CacheSection(Section):
    """Answers that are given again: to requests with temperature 0 or a seed."""

    megabytes: int = Field(64, ge=1)
    """Memory for them."""
    seconds: float = Field(3600, gt=0)
    """How long one is given again."""
    redis: str | None = None
    """Keep them in Redis, shared by several servers: redis://host:6379/0."""


class LimitsSection(Section):
    """How much each key may ask."""

    requests_per_minute: int | None = Field(None, ge=1)
    """For keys that have no limit of their own."""
    tokens_per_day: int | None = Field(None, ge=1)
    """Of questions and answers together."""
    redis: str | None = None
    """Count in Redis, for several servers together: redis://host:6379/0."""


class RetrieveSection(Section):
    """Passages that are put into the prompt, from documents that change too often to be trained."""

    folder: str | None = None
    """A folder of text and Markdown files, searched by BM25."""
    url: str | None = None
    """A search behind HTTP: POST {query, top} -> {passages: [{text, source, title, score}]}."""
    top: int = Field(3, ge=1, le=20)
    """Passages for each question."""
    words: int = Field(180, ge=20)
    """Words of a passage, about."""
    timeout: float = Field(5.0, gt=0)
    """Seconds that the search may take."""
    instruction: str = "Answer from these passages where they help, and cite them by their number, as [1]."
    """What the model is told of them."""

    @model_validator(mode="after")
    def _one(self) -> RetrieveSection:
        if (self.folder is None) == (self.url is None):
            raise ValueError("give a folder or a url")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("url must begin with http:// or https://")
        return self


class RouteSection(Section):
    """One name for several versions."""

    versions: dict[str, float]
    """Models and their weights."""
    sticky: Literal["user", "none"] = "user"
    """Whether a user (`user` or `safety_identifier` of the request, else the key) always gets the same version."""
    fallback: tuple[str, ...] = ()
    """Who answers when the version fails: models, or https://host/v1#name."""
    shadow: str | None = None
    """A model that is asked as well, whose answers are only logged."""
    shadow_share: float = Field(1.0, ge=0, le=1)
    """For which share of requests."""

    @field_validator("versions")
    @classmethod
    def _weights(cls, value: dict[str, float]) -> dict[str, float]:
        if not value or any(not 0 <= w < float("inf") for w in value.values()) or not sum(value.values()):
            raise ValueError("versions need weights of 0 or more, and one above 0")
        return value


class TrafficSection(Section):
    """What is kept of requests and answers, where the server has a database."""

    text: Literal["none", "redacted", "full"] = "redacted"
    """Their text, and that of feedback: not at all, without personal data and secrets, or as it is."""
    days: float = Field(30, gt=0)
    """How long it is kept."""


class ServeSection(Section):
    """How a model is served."""

    engine: plugins.field("serving") = Field("auto", validate_default=True)  # type: ignore[valid-type]
    """What runs the model: auto, llamacpp, transformers or vllm, with its settings."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Of requests that name none; OpenAI's is 1."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer of requests that name no length; as much as the context leaves, if not given."""
    deadline: float = Field(600, gt=0)
    """Seconds within which an answer must be ready."""
    max_body: int = Field(8 << 20, ge=1024)
    """Largest request in bytes."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call from a browser; none, if not given."""
    open_metrics: bool = False
    """Show /metrics to whoever asks, also where the server has keys."""
    log_text: bool = False
    """Write what is asked and answered into the log's line of each request, as it is."""
    limits: LimitsSection = LimitsSection()
    """How much each key may ask."""
    cache: CacheSection | None = None
    """Give answers again; not at all, if not given."""
    guards: tuple[plugins.field("guard"), ...] = ()  # type: ignore[valid-type]
    """What may go in and come out."""
    retrieve: RetrieveSection | None = None
    """Put passages of documents into prompts."""
    routes: dict[str, RouteSection] = {}
    """Names that stand for several versions. A routes file, as promote writes it, comes on top."""
    traffic: TrafficSection = TrafficSection()
    """What is kept of requests and answers."""
