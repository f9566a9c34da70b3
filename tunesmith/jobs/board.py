"""What becomes of a job: its statuses, and what is told of each change, in one transaction.

validating_files -> queued -> running -> succeeded | failed
any that is not final -> cancelled; running -> paused -> queued

A status is what was asked of a job. Who asks for a pause or a cancel sets it at once; the worker that holds the job
sees so at its next heartbeat, saves what there is, and lets go.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tunesmith.store import ids
from tunesmith.store.audit import record
from tunesmith.store.tables import Checkpoint, Delivery, Event, Job, Model, Project, Webhook

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

FINAL = ("succeeded", "failed", "cancelled")
WAITING = ("validating_files", "queued")


class CanNot(ValueError):
    """A change that the job's status does not allow."""


def create(session: Session, job: Job) -> None:
    """Put a job on the board."""
    session.add(job)
    session.flush()
    say(session, job.id, f"Created fine-tuning job: {job.id}")
    record(
        session, job.project, job.key, "job.create", job.id, {"model": job.model, "training_file": job.training_file}
    )


def held(session: Session, id: str, project: str | None = None) -> Job | None:
    """A job, which nobody else changes until the transaction ends."""
    found = session.scalar(sa.select(Job).where(Job.id == id).with_for_update())
    return found if found is not None and project in (None, found.project) else None


def cancel(session: Session, job: Job, by: str | None) -> None:
    if job.status in FINAL:
        raise CanNot(f"Job {job.id} has already {_ended(job.status)} and cannot be cancelled.")
    _end(session, job, "cancelled")
    say(session, job.id, f"Fine-tuning job cancelled: {job.id}")
    record(session, job.project, by, "job.cancel", job.id)


def pause(session: Session, job: Job, by: str | None) -> None:
    if job.status != "running":
        raise CanNot(f"Job {job.id} is {job.status}; only a running job can be paused.")
    job.status = "paused"
    say(session, job.id, "Fine-tuning job paused")
    record(session, job.project, by, "job.pause", job.id)


def resume(session: Session, job: Job, by: str | None) -> None:
    if job.status != "paused":
        raise CanNot(f"Job {job.id} is {job.status}; only a paused job can be resumed.")
    job.status = "queued"
    job.attempts = 0
    say(session, job.id, "Fine-tuning job resumed, moving job to queued state")
    record(session, job.project, by, "job.resume", job.id)


def validate(session: Session, job: Job) -> None:
    """A worker has taken a new job."""
    beside = f" and validation file: {job.validation_file}" if job.validation_file else ""
    say_once(session, job.id, f"Validating training file: {job.training_file}{beside}")


def validated(
    session: Session, job: Job, numbers: dict[str, Any], needs: dict[str, Any], recipe: dict[str, Any]
) -> None:
    """The files are good, and what was left to a rule has a number."""
    kind = job.method["type"]
    job.hyperparameters = numbers
    job.method = {"type": kind, kind: {**job.method[kind], "hyperparameters": numbers}}
    job.needs, job.recipe, job.status = needs, recipe, "queued"
    say(session, job.id, "Files validated, moving job to queued state")
    if left_out := needs.get("left_out"):
        say(session, job.id, f"{left_out} rows of the training file are not trained on", level="warn")


def start(session: Session, job: Job) -> None:
    """A worker begins to train, or goes on."""
    job.status = "running"
    job.estimated_finish = int(time.time() + job.needs.get("seconds", 0)) or None
    if not say_once(session, job.id, "Fine-tuning job started"):
        say(session, job.id, f"Fine-tuning job goes on from step {job.progress}")


def step(session: Session, job: Job, line: dict[str, Any], total: int, epoch: bool) -> None:
    """A step was taken; `line` is of the run's metrics."""
    data, shown = metrics_of(line, epoch), []
    for name, key in (
        ("training loss", "train_loss"),
        ("validation loss", "valid_loss"),
        ("full validation loss", "full_valid_loss"),
    ):
        if key in data:
            shown.append(f"{name}={data[key]:.2f}")
    say(
        session,
        job.id,
        f"Step {line['step']}/{total}: {', '.join(shown)}",
        kind="metrics",
        data={"step": line["step"], "total_steps": total} | data,
    )
    job.progress, job.attempts = line["step"], 0


def metrics_of(line: dict[str, Any], epoch: bool = True) -> dict[str, Any]:
    """A line of a run's metrics in OpenAI's words. Every validation here is of the whole file."""
    accuracy = line.get("token_accuracy", line.get("rewards_accuracy"))
    valid = line.get("validation_token_accuracy", line.get("validation_rewards_accuracy"))
    found = {
        "train_loss": line["loss"],
        "train_mean_token_accuracy": accuracy,
        "valid_loss": line.get("validation_loss"),
        "valid_mean_token_accuracy": valid,
    }
    if epoch:
        found |= {"full_valid_loss": found["valid_loss"], "full_valid_mean_token_accuracy": valid}
    return {name: value for name, value in found.items() if value is not None}


def checkpoint(
    session: Session,
    job: Job,
    number: int,
    metrics: dict[str, Any],
    artifact: str,
    keep: int,
    held: bool = False,
) -> list[str]:
    """A model from the middle of the job; returns the artifacts of those that go because of it.

    Args:
        held: it is not served before the job's gate has let it pass.
    """
    name = f"{model_name(session, job)}:ckpt-step-{number}"
    if number <= job.seen:  # it was there, and may have been deleted since
        return []
    job.seen = number
    session.add(
        Checkpoint(
            id=ids.new("ftckpt_"),
            job=job.id,
            created_at=int(time.time()),
            model=name,
            step=number,
            metrics={"step": number} | metrics,
        )
    )
    session.add(_model(job, name, number, artifact, held=held))
    say(session, job.id, f"Checkpoint created at step {number} with Snapshot ID: {name}")
    session.flush()
    gone = list(
        session.scalars(
            sa.select(Checkpoint).where(Checkpoint.job == job.id).order_by(Checkpoint.step.desc()).offset(keep)
        )
    )
    artifacts = []
    for old in gone:
        begun = sa.select(Job.n).where(Job.model == old.model, Job.status.not_in(FINAL))
        if session.scalar(begun) is not None:  # another job trains on it
            continue
        model = session.scalar(sa.select(Model).where(Model.id == old.model))
        if model is not None:
            artifacts.append(model.artifact)
            session.delete(model)
        session.delete(old)
    return artifacts


def succeed(session: Session, job: Job, artifact: str, whole: bool, tokens: int, results: list[str]) -> None:
    """The model is there."""
    name = model_name(session, job)
    session.add(_model(job, name, None, artifact, whole))
    job.fine_tuned_model, job.trained_tokens, job.result_files = name, tokens, results
    say(session, job.id, f"New fine-tuned model created: {name}")
    _end(session, job, "succeeded")
    say(session, job.id, "The job has successfully completed")


def _model(job: Job, name: str, step: int | None, artifact: str, whole: bool = False, held: bool = False) -> Model:
    return Model(
        id=name,
        project=job.project,
        base=base_of(job),
        job=job.id,
        step=step,
        artifact=artifact,
        whole=whole,
        held=held,
        created_at=int(time.time()),
    )


def fail(session: Session, job: Job, code: str, message: str, param: str | None = None) -> None:
    job.error = {"code": code, "message": message, "param": param}
    _end(session, job, "failed")
    say(session, job.id, message, level="error")


def _end(session: Session, job: Job, status: str) -> None:
    job.status, job.finished_at, job.estimated_finish = status, int(time.time()), None
    waiting = sa.and_(Model.job == job.id, Model.held)
    if status == "succeeded":
        session.execute(sa.update(Model).where(waiting).values(held=False))
    else:
        session.execute(sa.delete(Checkpoint).where(Checkpoint.model.in_(sa.select(Model.id).where(waiting))))
        session.execute(sa.delete(Model).where(waiting))
    tell(session, job.project, f"fine_tuning.job.{status}", {"id": job.id})


def tell(session: Session, project: str, kind: str, data: dict[str, Any]) -> None:
    """Queue an event for the project's webhooks."""
    for hook in session.scalars(sa.select(Webhook).where(Webhook.project == project)):
        if not hook.events or kind in hook.events:
            event = {
                "id": ids.new("evt_"),
                "object": "event",
                "created_at": int(time.time()),
                "type": kind,
                "data": data,
            }
            session.add(
                Delivery(
                    id=event["id"],
                    webhook=hook.id,
                    type=kind,
                    payload=event,
                    created_at=event["created_at"],
                    next_at=time.time(),
                )
            )


def say(
    session: Session,
    job: str,
    message: str,
    level: str = "info",
    kind: str = "message",
    data: dict[str, Any] | None = None,
) -> None:
    """Add an event."""
    session.add(
        Event(
            id=ids.new("ftevent-"),
            job=job,
            created_at=int(time.time()),
            level=level,
            message=message,
            type=kind,
            data=data or {},
        )
    )
    session.flush()


def say_once(session: Session, job: str, message: str, level: str = "info") -> bool:
    """Add an event unless it is there; returns whether it was not."""
    if session.scalar(sa.select(Event.n).where(Event.job == job, Event.message == message)) is not None:
        return False
    say(session, job, message, level)
    return True


def model_name(session: Session, job: Job) -> str:
    """`ft:{base}:{project}:{suffix}:{id}`."""
    project = session.scalar(sa.select(Project.name).where(Project.id == job.project))
    suffix = re.sub(r"[^A-Za-z0-9_.-]+", "-", job.suffix or "")
    return f"ft:{base_of(job)}:{project}:{suffix}:{job.id.removeprefix('ftjob-')[:8]}"


def base_of(job: Job) -> str:
    """The base model's name, whatever training began from."""
    return job.model.split(":")[1] if job.model.startswith("ft:") else job.model


def _ended(status: str) -> str:
    return "been cancelled" if status == "cancelled" else status
