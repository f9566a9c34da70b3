"""The queue, the same on SQLite and PostgreSQL: nobody has a job twice, dead workers' jobs go on, limits hold."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import sqlalchemy as sa

from tunesmith import store
from tunesmith.jobs import board
from tunesmith.jobs.queue import Capacity, Queue
from tunesmith.store import ids
from tunesmith.store.database import Store
from tunesmith.store.tables import Event, Job

ROOM = Capacity(cores=4, memory=4000)


@pytest.fixture
def opened(database: str) -> Any:
    found = store.open(database)
    found.keys.create_project("team")
    yield found
    found.close()


def worker(opened: Store, name: str, lease: float = 60.0, machine: str = "here", **more: Any) -> Queue:
    made = Queue(opened, name, more.pop("room", ROOM), lease, machine=machine, **more)
    made.sign_on()
    return made


def add(opened: Store, status: str = "queued", key: str | None = None, **more: Any) -> str:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}}
    job = Job(
        id=ids.new("ftjob-"),
        project=opened.keys.projects()[0].id,
        key=key,
        status=status,
        training_file="file-x",
        result_files=[],
        seed=1,
        method=method,
        hyperparameters={},
        info={},
        integrations=[],
        created_at=int(time.time()),
        **{"model": "tiny", "settings": {}, "needs": {"cores": 1, "memory": 1000}} | more,
    )
    with opened.write() as session:
        board.create(session, job)
    return job.id


def status(opened: Store, id: str) -> str:
    with opened.read() as session:
        return session.scalar(sa.select(Job.status).where(Job.id == id)) or ""


def said(opened: Store, id: str) -> list[str]:
    with opened.read() as session:
        return list(session.scalars(sa.select(Event.message).where(Event.job == id).order_by(Event.n)))


def test_each_job_is_had_once_however_many_ask(opened: Store) -> None:
    wanted = {add(opened) for _ in range(12)}
    had: list[str] = []

    def work(name: str) -> None:
        mine = worker(opened, name, room=Capacity(1000, 10**9))
        while (job := mine.claim()) is not None:
            had.append(job.id)

    threads = [threading.Thread(target=work, args=(f"w{i}",)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(had) == sorted(wanted)


def test_the_order_is_by_priority_then_age(opened: Store) -> None:
    first, low, high = add(opened), add(opened, priority=-1), add(opened, priority=5)
    mine = worker(opened, "w")
    assert [mine.claim().id for _ in range(3)] == [high, first, low]  # type: ignore[union-attr]
    assert mine.claim() is None


def test_a_dead_workers_job_goes_to_another_and_the_dead_can_change_nothing(opened: Store) -> None:
    job = add(opened)
    dead, alive = worker(opened, "dead", lease=0.3), worker(opened, "alive")
    assert dead.claim().id == job  # type: ignore[union-attr]
    assert alive.claim() is None and dead.beat(job) == "running"
    time.sleep(0.5)
    assert alive.claim().id == job  # type: ignore[union-attr]
    assert dead.beat(job) is None
    dead.release(job, again=True)
    dead.lost(job, "x")
    assert alive.beat(job) == "running"
    assert said(opened, job)[1:] == [
        "Fine-tuning job started",
        "The worker was lost; the job goes on with another",
        "Fine-tuning job goes on from step 0",
    ]


def test_a_job_that_kills_its_workers_fails_in_the_end(opened: Store) -> None:
    job = add(opened)
    for turn in range(3):
        mine = worker(opened, f"w{turn}", lease=0.01, attempts=3)
        found = mine.claim()
        assert (found is None) == (turn == 3)
        time.sleep(0.05)
    assert worker(opened, "last", attempts=3).claim() is None
    assert status(opened, job) == "failed" and "lost 3 times" in said(opened, job)[-1]


def test_limits_of_a_key_and_room_of_a_machine(opened: Store) -> None:
    key, _ = opened.keys.create("k", jobs_at_once=1)
    for _ in range(2):
        add(opened, key=key.id)
    large, small = add(opened, needs={"cores": 1, "memory": 3500}), add(opened, needs={"cores": 1, "memory": 900})
    mine, beside, elsewhere = worker(opened, "a"), worker(opened, "b"), worker(opened, "c", machine="there")
    first = mine.claim()
    assert first is not None and first.key == key.id
    assert beside.claim().id == small  # type: ignore[union-attr]
    assert beside.claim() is None
    assert elsewhere.claim().id == large  # type: ignore[union-attr]
    opened.engine.dispose()
    mine.release(first.id)
    with opened.write() as session:
        board.fail(session, board.held(session, first.id), "x", "x")  # type: ignore[arg-type]
    assert mine.claim().key == key.id  # type: ignore[union-attr]


def test_many_who_must_wait_keep_nobody_from_the_front(opened: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.jobs.queue.LOOKED_AT", 3)
    key, _ = opened.keys.create("k", jobs_at_once=1)
    for _ in range(5):
        add(opened, key=key.id)
    for _ in range(5):
        add(opened, needs={"cores": 3, "memory": 3500})
    other = add(opened)
    mine, beside = worker(opened, "a"), worker(opened, "b")
    assert mine.claim().key == key.id  # type: ignore[union-attr]
    assert beside.claim().id == other  # type: ignore[union-attr]


def test_a_job_that_fits_nowhere_is_told_so_once(opened: Store) -> None:
    large, huge = add(opened, needs={"cores": 8, "memory": 1}), add(opened, needs={"cores": 64, "memory": 1})
    mine = worker(opened, "a")
    worker(opened, "b", room=Capacity(cores=16, memory=4000))
    for _ in range(2):
        assert mine.claim() is None
    assert len(said(opened, large)) == 1
    assert [m for m in said(opened, huge)[1:] if "64 cores" in m] == said(opened, huge)[1:] != []


def test_a_plan_starts_the_job_or_lets_go_of_it(opened: Store) -> None:
    key, _ = opened.keys.create("k")
    first, second = (add(opened, "validating_files", key.id, needs={}) for _ in range(2))
    mine, other = worker(opened, "a", at_once=1), worker(opened, "b", at_once=1)
    assert mine.claim().id == first and other.claim().id == second  # type: ignore[union-attr]
    numbers, needs = {"n_epochs": 3}, {"cores": 1, "memory": 1}
    assert mine.planned(first, numbers, needs, {}) and not other.planned(second, numbers, needs, {})
    assert (status(opened, first), status(opened, second)) == ("running", "queued")
    assert said(opened, second)[1:] == [
        "Validating training file: file-x",
        "Files validated, moving job to queued state",
    ]
    assert other.claim() is None


def test_pause_resume_and_cancel_reach_the_worker(opened: Store) -> None:
    job = add(opened)
    mine, other = worker(opened, "a"), worker(opened, "b")
    mine.claim()
    for change, seen in ((board.pause, "paused"), (board.resume, "queued")):
        with opened.write() as session:
            change(session, board.held(session, job), None)  # type: ignore[arg-type]
        assert mine.beat(job) == seen
        assert other.claim() is None  # its worker has not let go of it yet
    mine.release(job, again=True)
    assert other.claim().id == job  # type: ignore[union-attr]
    with opened.write() as session:
        board.cancel(session, board.held(session, job), None)  # type: ignore[arg-type]
    assert other.beat(job) == "cancelled"
