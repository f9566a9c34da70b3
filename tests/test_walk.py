"""A worker's way with one job, without training: what is kept, what goes, and what a job's own process may say."""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from tests.test_queue import ROOM, add, said, status
from tunesmith.jobs import board, child, gpus, sweep, walk
from tunesmith.jobs.artifacts import model_key, run_key
from tunesmith.jobs.queue import Capacity, Queue
from tunesmith.jobs.request import JobRequest
from tunesmith.jobs.rows import check
from tunesmith.jobs.section import ServiceSection
from tunesmith.jobs.service import Service, open_service
from tunesmith.jobs.walk import Walk
from tunesmith.jobs.worker import machine_of
from tunesmith.store.tables import Checkpoint, Job, Model


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    found = open_service(ServiceSection(home=str(tmp_path / "home"), models={"tiny": "tiny"}))
    found.store.keys.create_project("team")
    yield found
    found.store.close()


def walking(service: Service, name: str = "w", **more: Any) -> Walk:
    """A worker that has just claimed a new job."""
    add(service.store, **more)
    queue = Queue(service.store, name, ROOM, 60.0, machine="here", attempts=3)
    job = queue.claim()
    assert job is not None
    return Walk(service, queue, job, 1, lambda: status(service.store, job.id))


def snapshot(found: Walk, step: int) -> Path:
    folder = found.run.snapshots / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def change(found: Walk, how: Any) -> None:
    with found.service.store.write() as session:
        how(session, board.held(session, found.job.id), None)


def models(service: Service, **by: Any) -> list[str]:
    with service.store.read() as session:
        return list(session.scalars(sa.select(Model.id).filter_by(**by).order_by(Model.n)))


def steps(service: Service) -> list[int]:
    with service.store.read() as session:
        return sorted(session.scalars(sa.select(Checkpoint.step)))


def test_a_planner_that_dies_is_not_tried_for_ever(service: Service) -> None:
    found = walking(service, status="validating_files", needs={})
    for _ in range(3):
        assert status(service.store, found.job.id) == "validating_files"
        found.settle({"kind": "died", "code": 1})
        found.queue.claim()
    assert status(service.store, found.job.id) == "failed"
    assert "3 times" in said(service.store, found.job.id)[-1]


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "0"])
def test_a_number_that_is_none_is_refused(number: str) -> None:
    asked = f'{{"model": "tiny", "training_file": "x", "hyperparameters": {{"learning_rate_multiplier": {number}}}}}'
    with pytest.raises(ValidationError):
        JobRequest.model_validate_json(asked)


def test_what_a_process_says_of_errors_that_nobody_foresaw() -> None:
    assert child.unforeseen(OSError(errno.ENOSPC, "No space left on device"))["code"] == "insufficient_resources"
    gone = child.unforeseen(FileNotFoundError(errno.ENOENT, "No such file or directory", "/home/x"))
    assert gone["code"] == "server_error" and "/home" not in gone["message"]
    assert child.unforeseen(TypeError("x"))["code"] == "server_error"


def test_snapshots_of_a_gated_job_wait_for_the_gate(service: Service) -> None:
    found = walking(service, settings={"gate": ["exact_match >= 0.5"]})
    found._keep(1, snapshot(found, 1))
    (name,) = models(service, held=True)
    assert service.model(name) is None
    found.fail("gate_held", "held")
    assert models(service) == [] and steps(service) == []
    assert not service.artifacts.path(model_key(found.job.id, 1)).exists()
    passed = walking(service, settings={"gate": ["exact_match >= 0.5"]})
    passed._keep(1, snapshot(passed, 1))
    with service.store.write() as session:
        held = passed.queue.held(session, passed.job.id)
        assert held is not None
        board.succeed(session, held, "models/x/final", False, 1, [])
    assert models(service, held=True) == [] and len(models(service)) == 2
    free = walking(service, settings={"gate": False})
    free._keep(1, snapshot(free, 1))
    assert models(service, held=True) == []


def test_a_deleted_checkpoint_stays_deleted(service: Service) -> None:
    found = walking(service)
    path = snapshot(found, 5)
    found._keep(5, path)
    with service.store.write() as session:
        session.execute(sa.delete(Checkpoint))
        session.execute(sa.delete(Model))
    service.forget(model_key(found.job.id, 5))
    with service.store.read() as session:
        again = session.scalar(sa.select(Job).where(Job.id == found.job.id))
    assert again is not None
    second = Walk(service, found.queue, again, 1, found.asked)
    second.tick()
    second._keep(5, path)
    assert steps(service) == [] and not service.artifacts.path(model_key(found.job.id, 5)).exists()


def test_who_has_lost_a_job_keeps_nothing_of_it(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    found = walking(service)
    path = snapshot(found, 5)
    monkeypatch.setattr(service.artifacts, "put_folder", lambda *_: pytest.fail("put"))
    monkeypatch.setattr(service.artifacts, "put", lambda *_: pytest.fail("put"))
    found.queue.worker = "another"
    found._keep(5, path)
    found._save("step-5")
    found.finish()
    assert models(service) == []


def test_a_snapshot_that_vanishes_while_it_is_copied_is_passed_over(service: Service) -> None:
    found = walking(service)
    path = snapshot(found, 5)
    (path / "weights").symlink_to(path / "gone")  # which is what copying finds then
    found._keep(5, path)
    assert steps(service) == []


def test_the_first_verdict_stands(service: Service) -> None:
    found = walking(service)
    ended: list[str] = []

    class Process:
        def kill(self) -> None:
            ended.append("killed")
            found.answers.put({"kind": "done"})
            found.answers.put(None)

        def wait(self) -> int:
            return -9

    change(found, board.cancel)
    assert found.follow(Process())["kind"] == "cancelled"  # type: ignore[arg-type]
    assert ended


def test_a_model_that_comes_after_the_cancel_is_not_kept(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    found = walking(service)
    (found.run.path / "train").mkdir(parents=True)
    made = found.run.tuned
    made.mkdir(parents=True, exist_ok=True)
    (made / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    put = service.artifacts.put_folder

    def cancelled(key: str, folder: Path) -> None:
        put(key, folder)
        change(found, board.cancel)

    monkeypatch.setattr(service.artifacts, "put_folder", cancelled)
    found.finish()
    assert status(service.store, found.job.id) == "cancelled"
    assert not service.artifacts.path(model_key(found.job.id)).exists() and not found.run.path.exists()
    assert [p for p in (service.settings.folder / "artifacts").rglob("*") if p.is_file()] == []


def test_what_could_not_be_served_is_no_model(service: Service) -> None:
    found = walking(service)
    (found.run.path / "train").mkdir(parents=True)
    found.run.tuned.mkdir()
    (found.run.tuned / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    found.finish()
    assert status(service.store, found.job.id) == "failed" and models(service) == []
    assert "no plain LoRA" in said(service.store, found.job.id)[-1]


def test_a_run_that_moves_on_is_not_kept_half(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    found = walking(service)
    (found.run.checkpoints / "step-1").mkdir(parents=True)

    def vanished(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("gone")

    monkeypatch.setattr(walk.tarfile.TarFile, "add", vanished)
    found._save("step-1")
    assert service.artifacts.names("runs") == [] and found.saved is None
    monkeypatch.undo()
    found._save("step-1")
    assert service.artifacts.names("runs") == [f"{found.job.id}.tar"]


def test_a_checkpoint_that_another_job_trains_on_stays(service: Service) -> None:
    found = walking(service)
    found._keep(1, snapshot(found, 1))
    (first,) = models(service)
    after = add(service.store, model=first)
    for step in (2, 3, 4, 5):
        found._keep(step, snapshot(found, step))
    assert steps(service) == [1, 3, 4, 5]
    with service.store.write() as session:
        board.cancel(session, board.held(session, after), None)  # type: ignore[arg-type]
    found._keep(6, snapshot(found, 6))
    assert steps(service) == [4, 5, 6]


def test_what_is_left_of_jobs_and_models_is_swept(service: Service) -> None:
    found = walking(service)
    found._keep(1, snapshot(found, 1))
    other = add(service.store)
    place = service.artifacts
    for key in (run_key(found.job.id), run_key(other), "runs/ftjob-anothers.tar"):
        place.put(key, io.BytesIO(b"rows"))
    for key in ("files/file-gone", f"{model_key('ftjob-gone')}/x", f"{model_key(found.job.id, 1)}/x"):
        (place.cache / key).parent.mkdir(parents=True, exist_ok=True)
        (place.cache / key).write_text("fetched")
    (place.cache / "files/.coming").write_text("")
    for job in (other, "ftjob-anothers"):
        place.put(f"{model_key(job)}/x", io.BytesIO(b"weights"))
    (service.runs / other).mkdir()
    with service.store.write() as session:
        board.cancel(session, board.held(session, other), None)  # type: ignore[arg-type]
    sweep.sweep(service)
    assert place.names("runs") == sorted([f"{found.job.id}.tar", "ftjob-anothers.tar"])
    assert place.names(f"models/{other}") == [] and place.names("models/ftjob-anothers") == ["final"]
    assert place.path(model_key(found.job.id, 1)).is_dir() and found.run.path.is_dir()
    assert not (service.runs / other).exists()
    cached = {p.relative_to(place.cache).as_posix() for p in place.cache.rglob("*") if p.is_file()}
    assert cached == {"files/.coming", f"{model_key(found.job.id, 1)}/x"}


def test_what_a_process_writes_aside_lies_in_the_runs_folder(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    found = walking(service)
    monkeypatch.setattr(found, "recipe", dict)
    started: list[dict[str, str]] = []

    class Process:
        stdin, stdout = io.StringIO(), io.StringIO()

        def __init__(self, *_: Any, env: dict[str, str], **__: Any) -> None:
            started.append(env)

    monkeypatch.setattr(walk.subprocess, "Popen", Process)
    hyper = {"learning_rate_multiplier": 1.0}
    found.job.method = {"type": "supervised", "supervised": {"hyperparameters": hyper}}
    found.begin()
    aside = Path(started[0]["TMPDIR"])
    assert aside.is_dir() and aside.is_relative_to(found.run.path)


def test_each_job_sees_its_own_devices(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Capacity(cores=8, memory=8000, gpus=3)
    for count in (2, 1, 1):
        add(service.store, needs={"cores": 1, "memory": 1, "gpus": count})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    given = []
    for name in "abc":
        queue = Queue(service.store, name, room, 60.0, machine="here")
        queue.sign_on()
        job = queue.claim()
        given.append(gpus.visible(job.needs) if job else None)
    assert given == [{"CUDA_VISIBLE_DEVICES": "4,5"}, {"CUDA_VISIBLE_DEVICES": "7"}, None]
    assert gpus.visible({"asked_gpus": 0}) == {"CUDA_VISIBLE_DEVICES": ""} and gpus.visible({}) == {}


def test_machines_of_one_name_differ(tmp_path: Path) -> None:
    homes = [tmp_path / name for name in ("a", "b")]
    for home in homes:
        home.mkdir()
    assert machine_of(homes[0]) == machine_of(homes[0]) != machine_of(homes[1])


def test_a_model_named_with_a_colon_is_refused() -> None:
    with pytest.raises(ValidationError, match="colons"):
        ServiceSection(models={"a:b": "x"})


def test_a_row_of_very_many_keys_is_read_at_once() -> None:
    row = "{" + ",".join(f'"k{i}": 1' for i in range(200_000)) + ', "k199999": 2}'
    began = time.monotonic()
    found = check([row.encode()])
    assert "k199999' is there twice" in found.problems[0].message
    assert time.monotonic() - began < 60
