"""The queue: who works on which job, for how long that is believed, and who may begin."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tunesmith.jobs import board
from tunesmith.store.tables import Job, Key, Worker

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from tunesmith.store.database import Store

LOCK = 0x6A6F6273  # of PostgreSQL's advisory locks, the one that who chooses a job holds
GRACE = 3600  # seconds that a worker is listed after its last sign
LOOKED_AT = 200  # jobs from the front of the queue


@dataclass(frozen=True)
class Capacity:
    """What a machine's workers may take together."""

    cores: int
    memory: int
    gpus: int = 0


class Queue:
    """Jobs as one worker sees them.

    A job is held by a lease that heartbeats extend; whoever finds it over takes the job. Every change that a worker
    makes names the worker, so one that has lost its job changes nothing.

    Args:
        worker: a name that no other process has.
        machine: where this worker's files are.
        lease: seconds.
        at_once: jobs of a key that may run together, unless the key says otherwise.
        attempts: workers that a job may lose without getting on.
    """

    def __init__(
        self,
        store: Store,
        worker: str,
        capacity: Capacity,
        lease: float,
        at_once: int | None = None,
        attempts: int = 5,
        machine: str = "",
    ) -> None:
        self.store, self.worker, self.capacity, self.lease = store, worker, capacity, lease
        self.at_once, self.attempts, self.machine = at_once, attempts, machine or socket.gethostname()

    def sign_on(self) -> None:
        with self.store.write() as session:
            now = _now(session)
            session.execute(sa.delete(Worker).where(Worker.seen_at < now - GRACE))
            session.add(
                Worker(
                    id=self.worker,
                    machine=self.machine,
                    cores=self.capacity.cores,
                    memory=self.capacity.memory,
                    gpus=self.capacity.gpus,
                    started_at=now,
                    seen_at=now,
                )
            )

    def sign_off(self) -> None:
        with self.store.write() as session:
            session.execute(sa.delete(Worker).where(Worker.id == self.worker))

    def claim(self) -> Job | None:
        """The next job that this worker may have: a new one to validate, one to start, or one whose worker is dead."""
        with self.store.write() as session:
            self._alone(session)
            now = _now(session)
            free = sa.or_(Job.worker.is_(None), Job.lease_until < now)
            wanted = sa.or_(
                sa.and_(Job.status.in_(board.WAITING), free), sa.and_(Job.status == "running", Job.lease_until < now)
            )
            asked = sa.select(Job).where(wanted).order_by(Job.priority.desc(), Job.n).limit(LOOKED_AT)
            for job in session.scalars(asked.with_for_update(skip_locked=True)):
                if job.status != "validating_files" and not self._may_start(session, job, now):
                    continue
                if job.worker is not None and not self._believed(session, job):
                    continue
                job.worker, job.lease_until = self.worker, now + self.lease
                if job.status == "validating_files":
                    board.validate(session, job)
                else:
                    self._start(session, job)
                return job
        return None

    def _believed(self, session: Session, job: Job) -> bool:
        """Whether a job that has lost its worker gets another."""
        job.attempts += 1
        if job.attempts < self.attempts:
            board.say(session, job.id, "The worker was lost; the job goes on with another", level="warn")
            return True
        job.worker = None
        board.fail(
            session,
            job,
            "worker_lost",
            f"The job's worker was lost {job.attempts} times at step {job.progress}. It may need more memory than "
            "there is.",
        )
        return False

    def planned(self, job: str, numbers: dict[str, Any], needs: dict[str, Any], recipe: dict[str, Any]) -> bool:
        """Note a plan; whether this worker may start the job now. If not, it has let go of it."""
        with self.store.write() as session:
            self._alone(session)
            found = self._mine(session, job)
            if found is None or found.status != "validating_files":
                if found is not None:
                    found.worker = found.lease_until = None
                return False
            board.validated(session, found, numbers, needs, recipe)
            if not self._may_start(session, found, _now(session)):
                found.worker = found.lease_until = None
                return False
            self._start(session, found)
            return True

    def _start(self, session: Session, job: Job) -> None:
        board.start(session, job)
        job.machine = job.machine or self.machine

    def _may_start(self, session: Session, job: Job, now: float) -> bool:
        """Whether the key's limit and this machine's room allow it."""
        running = list(
            session.scalars(sa.select(Job).where(Job.status == "running", Job.lease_until >= now, Job.id != job.id))
        )
        own = session.scalar(sa.select(Key.jobs_at_once).where(Key.id == job.key)) if job.key else None
        limit = own or self.at_once
        if limit is not None and sum(other.key == job.key for other in running) >= limit:
            return False
        here = set(session.scalars(sa.select(Worker.id).where(Worker.machine == self.machine)))
        beside = [other.needs for other in running if other.worker in here]
        return all(
            sum(needs.get(what, 0) for needs in beside) + job.needs.get(what, 0) <= room
            for what, room in (
                ("cores", self.capacity.cores),
                ("memory", self.capacity.memory),
                ("gpus", self.capacity.gpus),
            )
        )

    def beat(self, job: str | None = None) -> str | None:
        """Give a sign; the status of the job, or None where it is no longer this worker's."""
        with self.store.write() as session:
            now = _now(session)
            session.execute(sa.update(Worker).where(Worker.id == self.worker).values(seen_at=now))
            found = self._mine(session, job) if job else None
            if found is None:
                return None
            found.lease_until = now + self.lease
            return found.status

    def held(self, session: Session, job: str) -> Job | None:
        """The job, as long as it is this worker's, whatever is wanted of it by now."""
        return self._mine(session, job)

    def lost(self, job: str, why: str) -> None:
        """Let another worker try a job that this one could not go on with, unless too many have."""
        with self.store.write() as session:
            found = self._mine(session, job)
            if found is None:
                return
            if found.status in ("running", "validating_files"):
                found.attempts += 1
                if found.attempts >= self.attempts:
                    board.fail(session, found, "server_error", f"The job was tried {found.attempts} times: {why}.")
                else:
                    board.say(session, job, f"The job stopped ({why}) and is tried again", level="warn")
                    found.status = "queued" if found.status == "running" else found.status
            found.worker = found.lease_until = None

    def release(self, job: str, again: bool = False) -> None:
        """Let go of a job; `again`: a running one waits for another worker."""
        with self.store.write() as session:
            found = self._mine(session, job)
            if found is not None:
                if again and found.status == "running":
                    found.status = "queued"
                found.worker = found.lease_until = None

    def _mine(self, session: Session, job: str) -> Job | None:
        return session.scalar(sa.select(Job).where(Job.id == job, Job.worker == self.worker).with_for_update())

    def _alone(self, session: Session) -> None:
        """One at a time counts what runs and takes what is left; on SQLite a writing transaction is alone anyway."""
        if self.store.postgresql:
            session.execute(sa.text(f"SELECT pg_advisory_xact_lock({LOCK})"))


def _now(session: Session) -> float:
    """The database's clock where it has one, since machines' clocks differ."""
    if session.get_bind().dialect.name == "postgresql":
        return float(session.scalar(sa.text("SELECT extract(epoch FROM clock_timestamp())")))
    return time.time()


def running(store: Store) -> Sequence[Job]:
    with store.read() as session:
        return list(session.scalars(sa.select(Job).where(Job.status == "running")))
