"""The tables. Times are seconds since 1970; `n` counts rows in the order in which they came, which pages follow."""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Float, ForeignKey, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Counter = BigInteger().with_variant(Integer, "sqlite")


class Table(DeclarativeBase):
    """Every table counts its rows."""

    type_annotation_map = {dict[str, Any]: JSON, list[Any]: JSON, int: BigInteger, float: Float}

    n: Mapped[int] = mapped_column(Counter, primary_key=True, autoincrement=True)


def _id() -> Mapped[str]:
    return mapped_column(String(255), unique=True)


def _project() -> Mapped[str]:
    return mapped_column(ForeignKey("projects.id"), index=True)


class Project(Table):
    """Whose files, jobs and models they are. `name` stands in the names of its models."""

    __tablename__ = "projects"
    id: Mapped[str] = _id()
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[int]


class User(Table):
    """A person of a project."""

    __tablename__ = "users"
    id: Mapped[str] = _id()
    project: Mapped[str] = _project()
    name: Mapped[str] = mapped_column(String(255))
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[int]


class Key(Table):
    """A secret, of which only a hash is kept, and what its holder may do."""

    __tablename__ = "keys"
    id: Mapped[str] = _id()
    project: Mapped[str] = _project()
    user: Mapped[str | None] = mapped_column(ForeignKey("users.id"))
    name: Mapped[str] = mapped_column(String(255))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    hint: Mapped[str] = mapped_column(String(16))
    role: Mapped[str] = mapped_column(String(16))
    scopes: Mapped[list[Any]]
    rpm: Mapped[int | None]
    token_quota: Mapped[int | None]
    tokens_used: Mapped[int] = mapped_column(default=0)
    jobs_at_once: Mapped[int | None]
    created_at: Mapped[int]
    expires_at: Mapped[int | None]
    used_at: Mapped[int | None]


class Audit(Table):
    """Who changed what."""

    __tablename__ = "audit"
    id: Mapped[str] = _id()
    created_at: Mapped[int] = mapped_column(index=True)
    project: Mapped[str | None] = mapped_column(String(255), index=True)
    key: Mapped[str | None] = mapped_column(String(255))
    action: Mapped[str] = mapped_column(String(64))
    target: Mapped[str | None] = mapped_column(String(512))
    details: Mapped[dict[str, Any]]


class File(Table):
    """An uploaded file, or a job's result; its bytes are an artifact.

    `kind` is of the rows of a training file (chat, preference, ...), `rows` how many there are.
    """

    __tablename__ = "files"
    id: Mapped[str] = _id()
    project: Mapped[str] = _project()
    key: Mapped[str | None] = mapped_column(String(255))
    filename: Mapped[str] = mapped_column(String(1024))
    purpose: Mapped[str] = mapped_column(String(32))
    bytes: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[str] = mapped_column(String(16))
    status_details: Mapped[str | None] = mapped_column(Text)
    kind: Mapped[str | None] = mapped_column(String(32))
    rows: Mapped[int | None]
    created_at: Mapped[int]
    expires_at: Mapped[int | None]


class Upload(Table):
    """A file that comes in parts; `keep_for` is for how many seconds from then on it is kept."""

    __tablename__ = "uploads"
    id: Mapped[str] = _id()
    project: Mapped[str] = _project()
    key: Mapped[str | None] = mapped_column(String(255))
    filename: Mapped[str] = mapped_column(String(1024))
    purpose: Mapped[str] = mapped_column(String(32))
    mime_type: Mapped[str] = mapped_column(String(255))
    bytes: Mapped[int]
    status: Mapped[str] = mapped_column(String(16))
    file: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[int]
    expires_at: Mapped[int]
    keep_for: Mapped[int | None]


class Part(Table):
    """A part of an upload."""

    __tablename__ = "parts"
    id: Mapped[str] = _id()
    upload: Mapped[str] = mapped_column(ForeignKey("uploads.id", ondelete="CASCADE"), index=True)
    bytes: Mapped[int]
    created_at: Mapped[int]


class Job(Table):
    """A fine-tuning job, and its place in the queue.

    Attributes:
        status: what was asked of it. A worker that holds a job that is no longer running lets go of it.
        worker, lease_until: who holds it, and until when that is believed without a heartbeat.
        attempts: workers lost since it last got on; progress: the last step seen.
        recipe: what `pipeline` is given; needs: cores, memory and GPUs that the plan found.
        seen: the last step whose snapshot became a model.
        machine: where its run's folder lies; snapshot: the artifact that holds it for other machines.
    """

    __tablename__ = "jobs"
    id: Mapped[str] = _id()
    project: Mapped[str] = _project()
    key: Mapped[str | None] = mapped_column(String(255), index=True)
    status: Mapped[str] = mapped_column(String(32), index=True)
    priority: Mapped[int] = mapped_column(default=0)
    model: Mapped[str] = mapped_column(String(512))
    suffix: Mapped[str | None] = mapped_column(String(64))
    fine_tuned_model: Mapped[str | None] = mapped_column(String(512))
    training_file: Mapped[str] = mapped_column(String(255))
    validation_file: Mapped[str | None] = mapped_column(String(255))
    result_files: Mapped[list[Any]]
    seed: Mapped[int]
    method: Mapped[dict[str, Any]]
    hyperparameters: Mapped[dict[str, Any]]
    settings: Mapped[dict[str, Any]]
    info: Mapped[dict[str, Any]]
    integrations: Mapped[list[Any]]
    trained_tokens: Mapped[int | None]
    error: Mapped[dict[str, Any] | None]
    created_at: Mapped[int]
    estimated_finish: Mapped[int | None]
    finished_at: Mapped[int | None]
    worker: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[float | None]
    attempts: Mapped[int] = mapped_column(default=0)
    progress: Mapped[int] = mapped_column(default=0)
    recipe: Mapped[dict[str, Any] | None]
    needs: Mapped[dict[str, Any]]
    seen: Mapped[int] = mapped_column(default=0)
    machine: Mapped[str | None] = mapped_column(String(255))
    snapshot: Mapped[str | None] = mapped_column(String(512))


class Event(Table):
    """What a job tells of itself."""

    __tablename__ = "events"
    id: Mapped[str] = _id()
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[int]
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(Text)
    type: Mapped[str] = mapped_column(String(16))
    data: Mapped[dict[str, Any]]


class Checkpoint(Table):
    """A model from the middle of a job."""

    __tablename__ = "checkpoints"
    id: Mapped[str] = _id()
    job: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), index=True)
    created_at: Mapped[int]
    model: Mapped[str] = mapped_column(String(512))
    step: Mapped[int]
    metrics: Mapped[dict[str, Any]]


class Permission(Table):
    """A project that may use another's checkpoint."""

    __tablename__ = "permissions"
    id: Mapped[str] = _id()
    model: Mapped[str] = mapped_column(String(512), index=True)
    project: Mapped[str] = _project()
    created_at: Mapped[int]


class Model(Table):
    """A tuned model: `id` is its `ft:` name, `artifact` the folder of its adapter or weights."""

    __tablename__ = "models"
    id: Mapped[str] = mapped_column(String(512), unique=True)
    project: Mapped[str] = _project()
    base: Mapped[str] = mapped_column(String(512))
    job: Mapped[str] = mapped_column(String(255), index=True)
    step: Mapped[int | None]
    artifact: Mapped[str] = mapped_column(String(512))
    whole: Mapped[bool] = mapped_column(default=False)
    held: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[int]


class Worker(Table):
    """A worker that is, or was, there."""

    __tablename__ = "workers"
    id: Mapped[str] = _id()
    machine: Mapped[str] = mapped_column(String(255))
    cores: Mapped[int]
    memory: Mapped[int]
    gpus: Mapped[int]
    started_at: Mapped[float]
    seen_at: Mapped[float]


class Traffic(Table):
    """An answer that was served. `request` and `response` are None where text is not kept."""

    __tablename__ = "traffic"
    id: Mapped[str] = _id()
    project: Mapped[str | None] = mapped_column(String(255), index=True)
    key: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[float] = mapped_column(index=True)
    endpoint: Mapped[str] = mapped_column(String(64))
    model: Mapped[str] = mapped_column(String(512))
    served_by: Mapped[str | None] = mapped_column(String(512))
    user: Mapped[str | None] = mapped_column(String(255))
    status: Mapped[int]
    prompt_tokens: Mapped[int]
    completion_tokens: Mapped[int]
    seconds: Mapped[float]
    flags: Mapped[list[Any]]
    request: Mapped[dict[str, Any] | None]
    response: Mapped[dict[str, Any] | None]


class Feedback(Table):
    """What somebody said of an answer."""

    __tablename__ = "feedback"
    id: Mapped[str] = _id()
    answer: Mapped[str] = mapped_column(ForeignKey("traffic.id", ondelete="CASCADE"), index=True)
    project: Mapped[str | None] = mapped_column(String(255), index=True)
    key: Mapped[str | None] = mapped_column(String(255))
    created_at: Mapped[float]
    rating: Mapped[float | None]
    correction: Mapped[str | None] = mapped_column(Text)
    comment: Mapped[str | None] = mapped_column(Text)


class Webhook(Table):
    """Where a project's events are told. The secret signs them, so it is kept as it is."""

    __tablename__ = "webhooks"
    id: Mapped[str] = _id()
    project: Mapped[str] = _project()
    url: Mapped[str] = mapped_column(String(2048))
    events: Mapped[list[Any]]
    secret: Mapped[str] = mapped_column(String(255))
    created_at: Mapped[int]


class Delivery(Table):
    """An event on its way to a webhook; `next_at` is None once it has arrived or was given up."""

    __tablename__ = "deliveries"
    id: Mapped[str] = _id()
    webhook: Mapped[str] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"), index=True)
    type: Mapped[str] = mapped_column(String(64))
    payload: Mapped[dict[str, Any]]
    created_at: Mapped[int]
    attempts: Mapped[int] = mapped_column(default=0)
    next_at: Mapped[float | None] = mapped_column(index=True)
    delivered_at: Mapped[int | None]
    last_error: Mapped[str | None] = mapped_column(Text)
