"""The queue: who works on which job, for how long that is believed, and who may begin."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
LOOKED_AT = 200  # jobs of the queue at a time
SILENT = 60.0  # seconds after whose last sign a worker is not counted on


@dataclass(frozen=True)
class Capacity:
    """What a machine's workers may take together."""

    cores: int
    memory: int
    gpus: int = 0


def fits(needs: dict[str, Any], capacity: Capacity) -> bool:
    return all(needs.get(what, 0) <= getattr(capacity, what) for what in ("cores", "memory", "gpus"))


@dataclass(frozen=True)
class Room:
    """What is left now.

    Attributes:
        beside: what the jobs need that run on this machine.
        full: keys that have as many jobs running as they may.
    """

    capacity: Capacity
    beside: list[dict[str, Any]]
    full: frozenset[str]

    def has(self, needs: dict[str, Any]) -> bool:
        taken = {what: sum(other.get(what, 0) for other in self.beside) for what in ("cores", "memory", "gpus")}
        return fits({what: needs.get(what, 0) + taken[what] for what in taken}, self.capacity)

    def devices(self, count: int) -> list[int]:
        """The first GPUs that no other job has."""
        taken = {place for other in self.beside for place in other.get("devices", ())}
        return [place for place in range(self.capacity.gpus) if place not in taken][:count]


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
            room = self._room(session, now)
            free = sa.or_(Job.worker.is_(None), Job.lease_until < now)
            wanted = sa.or_(
                sa.and_(Job.status.in_(board.WAITING), free), sa.and_(Job.status == "running", Job.lease_until < now)
            )
            full = sa.and_(Job.status != "validating_files", Job.key.is_not(None), Job.key.in_(room.full))
            asked = sa.select(Job).where(wanted, ~full).order_by(Job.priority.desc(), Job.n)
            for job in self._all(session, asked):
                if job.status != "validating_files" and not room.has(job.needs):
                    if not fits(job.needs, self.capacity):
                        self._nowhere(session, job, now)
                    continue
                if job.worker is not None and not self._believed(session, job):
                    continue
                job.worker, job.lease_until = self.worker, now + self.lease
                if job.status == "validating_files":
                    board.validate(session, job)
                else:
                    self._start(session, job, room)
                return job
        return None

    def _all(self, session: Session, asked: sa.Select[Any]) -> Iterator[Job]:
        """The queue from its front, some jobs at a time."""
        place = 0
        while page := list(session.scalars(asked.offset(place).limit(LOOKED_AT).with_for_update(skip_locked=True))):
            yield from page
            place += LOOKED_AT

    def _nowhere(self, session: Session, job: Job, now: float) -> None:
        """Say so, once, where no worker that is there could ever take the job."""
        alive = sa.select(Worker).where(Worker.seen_at > now - max(SILENT, self.lease))
        if not any(fits(job.needs, Capacity(w.cores, w.memory, w.gpus)) for w in session.scalars(alive)):
            needs = f"{job.needs.get('cores', 0)} cores, {job.needs.get('memory', 0) / 2**30:.1f} GiB of memory"
            more = f" and {job.needs['gpus']} GPUs" if job.needs.get("gpus") else ""
            board.say_once(
                session, job.id, f"No machine has room for this job ({needs}{more}); it waits for one that has", "warn"
            )

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

    def planned(
        self, job: str, numbers: dict[str, Any], needs: dict[str, Any], recipe: dict[str, Any]
    ) -> dict[str, Any] | None:
        """Note a plan; returns what the job was given if this worker may start it now. If not, it has let go of it."""
        with self.store.write() as session:
            self._alone(session)
            found = self._mine(session, job)
            if found is None or found.status != "validating_files":
                if found is not None:
                    found.worker = found.lease_until = None
                return None
            board.validated(session, found, numbers, needs, recipe)
            room = self._room(session, _now(session))
            if found.key in room.full or not room.has(found.needs):
                found.worker = found.lease_until = None
                return None
            self._start(session, found, room)
            return found.needs

    def _start(self, session: Session, job: Job, room: Room) -> None:
        board.start(session, job)
        if job.needs.get("gpus"):
            job.needs = job.needs | {"devices": room.devices(job.needs["gpus"])}
        job.machine = job.machine or self.machine

    def _room(self, session: Session, now: float) -> Room:
        running = list(session.scalars(sa.select(Job).where(Job.status == "running", Job.lease_until >= now)))
        counts = Counter(job.key for job in running if job.key)
        own = dict(session.execute(sa.select(Key.id, Key.jobs_at_once).where(Key.id.in_(counts))).tuples().all())
        limits = {key: own.get(key) or self.at_once for key in counts}
        here = set(session.scalars(sa.select(Worker.id).where(Worker.machine == self.machine)))
        return Room(
            self.capacity,
            [job.needs for job in running if job.worker in here],
            frozenset(key for key, limit in limits.items() if limit is not None and counts[key] >= limit),
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
