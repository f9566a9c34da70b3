"""/v1/fine_tuning: jobs, what they tell, and the models from their middle."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from tunesmith.api import shapes
from tunesmith.api.auth import needs
from tunesmith.api.errors import ApiError
from tunesmith.api.files import Id, service_of
from tunesmith.errors import RecipeError
from tunesmith.jobs import board, recipe
from tunesmith.jobs.request import JobRequest
from tunesmith.jobs.rows import LEAST_ROWS, METHODS
from tunesmith.jobs.service import Service
from tunesmith.store import ids
from tunesmith.store import tables as t
from tunesmith.store.audit import record

router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"])
RETRIED = 900  # seconds in which the same request, said to be a retry, means the same job
After = Annotated[str | None, Query(max_length=255)]
Limit20 = Annotated[int, Query(ge=1, le=1000)]
View, Run, Admin = needs("viewer", "jobs"), needs("runner", "jobs"), needs("admin", "jobs")


@router.post("/jobs")
def create(request: Request, body: JobRequest, caller: Any = Run) -> dict[str, Any]:
    """Create a job. What can be seen to be wrong is refused here, before anything starts."""
    service = service_of(request)
    shapes.keepable(body.model_dump())
    method = body.asked
    if method.type == "reinforcement":
        raise ApiError(
            400,
            "Method 'reinforcement' is not available here. Methods: supervised, dpo; and in train.method "
            f"{', '.join(recipe.TRAINABLE)}.",
            param="method.type",
            code="unsupported_method",
        )
    if body.priority > 0 and not caller.role == "admin":
        raise ApiError(
            403, "A priority above 0 takes an admin's key.", param="priority", code="insufficient_permissions"
        )
    _base(service, body.model, caller.project, body.settings)
    alone = recipe.whole(body.settings)
    hash = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
    given = {"hyperparameters": method.hyperparameters.model_dump(mode="json")}
    row = t.Job(
        id=ids.new("ftjob-"),
        project=caller.project,
        key=caller.key,
        status="validating_files",
        priority=body.priority,
        model=body.model,
        suffix=body.suffix,
        training_file=body.training_file,
        validation_file=body.validation_file,
        result_files=[],
        seed=body.seed if body.seed is not None else secrets.randbelow(2**31),
        method={"type": method.type, method.type: given},
        hyperparameters=given["hyperparameters"],
        settings=body.settings,
        info=body.metadata or {},
        integrations=[i.model_dump() for i in body.integrations or []],
        created_at=int(time.time()),
        needs={"request": hash}
        | {f"asked_{name}": value for name, value in body.resources.model_dump().items() if value is not None},
    )
    _sensible(row, service.settings.models)
    with service.store.write() as session:
        session.scalar(sa.select(t.Key.n).where(t.Key.id == caller.key).with_for_update())  # a key's, one at a time
        earlier = _retried(request, session, caller.key, hash)
        if earlier is not None:
            return shapes.job(earlier)
        if body.model not in service.settings.models:  # what began from it is looked at by whoever deletes it
            beside = sa.select(t.Model.n).where(t.Model.id == body.model).with_for_update()
            if session.scalar(beside) is None:
                raise ApiError(400, f"Model {body.model} has been deleted.", param="model", code="model_not_available")
        if alone:
            _room(request, session)
        for param, least in (("training_file", LEAST_ROWS), ("validation_file", 1)):
            _file(session, row, param, least, _kinds(body))
        board.create(session, row)
    return shapes.job(row)


def _base(service: Service, model: str, project: str, settings: dict[str, Any]) -> None:
    """Raise unless the model can be trained by this project."""
    if model in service.settings.models:
        return
    found = service.model(model) if model.startswith("ft:") else None
    if found is None or found.project != project or found.base not in service.settings.models:
        known = ", ".join(service.settings.models)
        raise ApiError(
            400,
            f"Model {model[:200]} is not available for fine-tuning or does not exist. Base models here: {known}.",
            param="model",
            code="model_not_available",
        )
    kind = recipe.whole(settings) and recipe.adapter(settings).get("kind")
    if found.whole and kind not in ("full", "partial"):
        why = f"Model {model[:200]} is no LoRA: it can be trained further as a whole only (full, partial)."
    elif not found.whole and kind:
        why = f"Model {model[:200]} is a LoRA, and can be trained further as such only."
    else:
        return
    raise ApiError(400, why, param="train.adapter", code="invalid_settings")


def _room(request: Request, session: Any) -> None:
    """Raise unless one more model with an engine of its own can be served."""
    state = request.app.state.tunesmith
    engine = state.settings.engine
    if engine.kind == "vllm" and engine.url:
        why = "the engine here is a server that runs already, which takes LoRA only"
    else:
        most = state.service.settings.whole_models
        there = session.scalar(sa.select(sa.func.count()).select_from(t.Model).where(t.Model.whole))
        under_way = session.scalars(sa.select(t.Job.settings).where(t.Job.status.not_in(board.FINAL)))
        if there + sum(map(recipe.whole, under_way)) < most:
            return
        why = f"this service serves {most} such models, and as many are there or under way"
    raise ApiError(
        400,
        f"train.adapter: what is no plain LoRA takes an engine of its own, and {why}. Take lora, or delete a model.",
        param="train.adapter",
        code="no_room_to_serve",
    )


def _sensible(row: t.Job, models: dict[str, str]) -> None:
    """Raise unless the job makes a recipe."""
    try:
        recipe.refuse(row.settings)
        keys = recipe.recipe_of(
            row.id, "base", row.seed, row.method, row.settings, ("rows.jsonl", None), None, row.integrations
        )
        recipe.checked(keys)
    except RecipeError as error:
        told = " ".join(error.what.split())
        where = error.where if error.where and error.where != "settings" else told.partition(":")[0]
        raise ApiError(
            400, f"{where}: {told}" if where not in told else told, param=where, code="invalid_settings"
        ) from None


def _kinds(body: JobRequest) -> tuple[str, ...]:
    """Kinds of rows that the job's method learns from."""
    own = (body.train or {}).get("method")
    kind = own.get("kind") if isinstance(own, dict) else own
    if kind is None:
        return tuple(rows for rows, methods in METHODS.items() if body.asked.type in methods)
    takes = {"kto": ("rated", "preference"), "text": ("text",), "sft": ("chat", "completions")}
    return takes.get(kind, ("preference",))


def _file(session: Any, row: t.Job, param: str, least: int, kinds: Sequence[str]) -> None:
    """Raise unless a file of the job is there and holds rows for it."""
    id = getattr(row, param)
    if id is None:
        return
    alive = sa.or_(t.File.expires_at.is_(None), t.File.expires_at > int(time.time()))
    asked = sa.select(t.File).where(t.File.id == id, t.File.project == row.project, alive)
    file = session.scalar(asked.with_for_update())
    what = "Training" if param == "training_file" else "Validation"
    if file is None:
        raise ApiError(400, f"{what} file {id[:80]} does not exist.", param=param, code="file_not_found")
    if file.purpose != "fine-tune":
        raise ApiError(
            400,
            f"{what} file {id} has purpose '{file.purpose}', not 'fine-tune'.",
            param=param,
            code="invalid_file_purpose",
        )
    if file.kind not in kinds:
        raise ApiError(
            400,
            f"{what} file {id} holds rows of kind '{file.kind}'; this method learns from: {', '.join(kinds)}.",
            param=param,
            code="invalid_training_file",
        )
    if (file.rows or 0) < least:
        raise ApiError(
            400,
            f"{what} file has {file.rows} example(s), but must have at least {least} examples",
            param=param,
            code="invalid_n_examples",
        )


def _retried(request: Request, session: Any, key: str, hash: str) -> t.Job | None:
    """The job that an earlier try of this very request made."""
    if request.headers.get("x-stainless-retry-count", "0") in ("", "0"):
        return None
    since = int(time.time()) - RETRIED
    recent = session.scalars(
        sa.select(t.Job).where(t.Job.key == key, t.Job.created_at >= since).order_by(t.Job.n.desc())
    )
    return next((job for job in recent if job.needs.get("request") == hash), None)


@router.get("/jobs")
async def list_jobs(request: Request, after: After = None, limit: Limit20 = 20, caller: Any = View) -> dict[str, Any]:
    """The project's jobs, newest first; `metadata[key]=value` keeps those with it, `metadata=null` those without."""
    asked = sa.select(t.Job).where(t.Job.project == caller.project)
    postgresql = service_of(request).store.postgresql
    for name, value in request.query_params.multi_items():
        if name == "metadata" and value == "null":
            asked = asked.where(sa.cast(t.Job.info, sa.String) == "{}")
        elif name.startswith("metadata[") and name.endswith("]"):
            asked = asked.where(_holds(name[9:-1], value, postgresql))
    return await _read(request, lambda s: shapes.listed(*shapes.page(s, asked, t.Job, after, limit), shapes.job))


def _holds(name: str, value: str, postgresql: bool) -> sa.ColumnElement[bool]:
    """Whether a job's metadata has that value. Pairs are compared, since not every key can stand in a JSON path."""
    pairs = (sa.func.json_each_text if postgresql else sa.func.json_each)(t.Job.info).table_valued("key", "value")
    there = sa.select(sa.literal(1)).select_from(pairs).where(pairs.c.key == name, pairs.c.value == value)
    return there.correlate(t.Job).exists()


@router.get("/jobs/{id}")
async def retrieve(request: Request, id: Id, caller: Any = View) -> dict[str, Any]:
    return await _read(request, lambda session: shapes.job(_job(session, id, caller.project)))


@router.post("/jobs/{id}/cancel")
def cancel(request: Request, id: Id, caller: Any = Run) -> dict[str, Any]:
    return _change(request, id, caller, board.cancel)


@router.post("/jobs/{id}/pause")
def pause(request: Request, id: Id, caller: Any = Run) -> dict[str, Any]:
    """Stop at the end of the step at hand. What there is by then becomes a checkpoint."""
    return _change(request, id, caller, board.pause)


@router.post("/jobs/{id}/resume")
def resume(request: Request, id: Id, caller: Any = Run) -> dict[str, Any]:
    """Put a paused job back into the queue; it ends as if it had not been paused."""
    return _change(request, id, caller, board.resume)


def _change(request: Request, id: str, caller: Any, change: Callable[..., None]) -> dict[str, Any]:
    with service_of(request).store.write() as session:
        job = board.held(session, id, caller.project)
        if job is None:
            raise _none(id)
        try:
            change(session, job, caller.key)
        except board.CanNot as error:
            raise ApiError(400, str(error), param="status", code="invalid_status") from None
        return shapes.job(job)


@router.get("/jobs/{id}/events")
async def events(
    request: Request, id: Id, after: After = None, limit: Limit20 = 20, caller: Any = View
) -> dict[str, Any]:
    """What the job has told, newest first."""

    def read(session: Any) -> dict[str, Any]:
        _job(session, id, caller.project)
        asked = sa.select(t.Event).where(t.Event.job == id)
        return shapes.listed(*shapes.page(session, asked, t.Event, after, limit), shapes.event)

    return await _read(request, read)


@router.get("/jobs/{id}/checkpoints")
async def checkpoints(
    request: Request,
    id: Id,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    caller: Any = View,
) -> dict[str, Any]:
    """Models from the job's middle, newest first: one an epoch, the last three."""

    def read(session: Any) -> dict[str, Any]:
        _job(session, id, caller.project)
        asked = sa.select(t.Checkpoint).where(t.Checkpoint.job == id)
        return shapes.listed(*shapes.page(session, asked, t.Checkpoint, after, limit), shapes.checkpoint)

    return await _read(request, read)


async def _read(request: Request, read: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """What a transaction reads. The models that it tells of answer here before it is told."""

    def reading() -> dict[str, Any]:
        with service_of(request).store.read() as session:
            return read(session)

    found = await run_in_threadpool(reading)
    registry = request.app.state.tunesmith.registry
    if registry is not None:
        shown = found.get("data", [found])
        names = (row.get("fine_tuned_model") or row.get("fine_tuned_model_checkpoint") for row in shown)
        await registry.answer(*filter(None, names))
    return found


def _job(session: Any, id: str, project: str) -> t.Job:
    found = session.scalar(sa.select(t.Job).where(t.Job.id == id, t.Job.project == project))
    if found is None:
        raise _none(id)
    job: t.Job = found
    return job


def _none(id: str) -> ApiError:
    return ApiError(404, f"Could not find fine tune: {id[:80]}", param="fine_tune_id")


class Projects(BaseModel):
    """Who else may use a checkpoint."""

    project_ids: list[str] = Field(min_length=1, max_length=100)


PERMISSIONS = "/checkpoints/{model:path}/permissions"


@router.post(PERMISSIONS)
def permit(request: Request, model: str, body: Projects, caller: Any = Admin) -> dict[str, Any]:
    """Let other projects use a checkpoint."""
    rows = []
    with service_of(request).store.write() as session:
        _checkpoint(session, model, caller.project)
        for project in dict.fromkeys(body.project_ids):
            if session.scalar(sa.select(t.Project.n).where(t.Project.id == project)) is None:
                raise ApiError(400, f"No such project: {project[:80]}", param="project_ids")
            row = session.scalar(
                sa.select(t.Permission).where(t.Permission.model == model, t.Permission.project == project)
            )
            if row is None:
                row = t.Permission(id=ids.new("cp_"), model=model, project=project, created_at=int(time.time()))
                session.add(row)
                record(session, caller.project, caller.key, "permission.create", model, {"project": project})
            rows.append(row)
    return shapes.listed(rows, False, shapes.permission)


@router.get(PERMISSIONS)
def permissions(
    request: Request,
    model: str,
    project_id: str | None = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 10,
    order: Literal["ascending", "descending"] = "descending",
    caller: Any = Admin,
) -> dict[str, Any]:
    with service_of(request).store.read() as session:
        _checkpoint(session, model, caller.project)
        asked = sa.select(t.Permission).where(t.Permission.model == model)
        if project_id is not None:
            asked = asked.where(t.Permission.project == project_id)
        rows, more = shapes.page(session, asked, t.Permission, after, limit, order == "descending")
        return shapes.listed(rows, more, shapes.permission)


@router.delete(PERMISSIONS + "/{id}")
def forbid(request: Request, model: str, id: Id, caller: Any = Admin) -> dict[str, Any]:
    with service_of(request).store.write() as session:
        _checkpoint(session, model, caller.project)
        row = session.scalar(sa.select(t.Permission).where(t.Permission.id == id, t.Permission.model == model))
        if row is None:
            raise ApiError(404, f"No such permission: {id[:80]}", param="permission_id")
        session.delete(row)
        record(session, caller.project, caller.key, "permission.delete", model, {"project": row.project})
    return {"id": id, "object": "checkpoint.permission", "deleted": True}


def _checkpoint(session: Any, model: str, project: str) -> None:
    if session.scalar(sa.select(t.Model.n).where(t.Model.id == model, t.Model.project == project)) is None:
        raise ApiError(404, f"No such checkpoint: {model[:200]}", param="fine_tuned_model_checkpoint")


class Grading(BaseModel):
    """A grader, and what it is to grade."""

    grader: dict[str, Any]
    model_sample: str = ""
    item: Any = None


@router.post("/alpha/graders/{verb}")
def graders(verb: Literal["run", "validate"], body: Grading, caller: Any = Run) -> dict[str, Any]:
    """Graders belong to reinforcement fine-tuning, which is not available here."""
    raise ApiError(
        400,
        "Graders are part of method 'reinforcement', which is not available here. `evaluate` in a job's settings "
        "scores answers.",
        param="grader",
        code="unsupported_method",
    )
