"""A worker: claims a job, walks it, claims the next. A worker has one job at a time; a machine may have several."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time

import psutil
import sqlalchemy as sa

from tunesmith.jobs.board import FINAL
from tunesmith.jobs.child import end_with
from tunesmith.jobs.queue import Capacity, Queue
from tunesmith.jobs.section import ServiceSection
from tunesmith.jobs.service import Service, open_service
from tunesmith.jobs.walk import GIB, Walk, patiently
from tunesmith.runs import hash_json
from tunesmith.store.tables import Job

log = logging.getLogger("tunesmith.worker")
SWEEP = 600.0  # seconds between looks for what is left of finished jobs
IDLE = 1.0  # seconds between looks at an empty queue


class Worker:
    """Works until it is asked to stop; then its job is saved, and waits for another."""

    def __init__(self, service: Service) -> None:
        settings = service.settings
        host, capacity = socket.gethostname(), capacity_of(settings)
        machine = f"{host}-{hash_json(str(settings.folder))[:8]}"  # runs lie in a folder of a host
        name = f"{host}-{os.getpid()}-{secrets.token_hex(3)}"
        self.service, self.cores = service, max(1, capacity.cores // max(settings.workers, 1))
        self.queue = Queue(
            service.store, name, capacity, settings.lease, settings.jobs_at_once, settings.attempts, machine
        )
        self.leaving = threading.Event()
        self._job: Job | None = None
        self._swept = -SWEEP
        self._status: str | None = None

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.leaving.set())
        patiently(self.queue.sign_on)
        threading.Thread(target=self._beat, daemon=True).start()
        while not self.leaving.is_set():
            self.sweep()
            job = patiently(self.queue.claim)
            if job is None:
                self.leaving.wait(IDLE)
                continue
            self._job, self._status = job, job.status
            try:
                Walk(self.service, self.queue, job, self.cores, self.asked)()
            except Exception as error:
                log.exception("job %s", job.id)
                self._lost(job, error)
            finally:
                self._job = None
        patiently(self.queue.sign_off)

    def sweep(self) -> None:
        """Remove what runs of finished jobs left here, as where another machine has finished them: rows are in it."""
        if time.monotonic() < self._swept + SWEEP or not self.service.runs.is_dir():
            return
        self._swept = time.monotonic()
        there = {path.name: path for path in self.service.runs.iterdir() if path.is_dir()}
        with self.service.store.read() as session:
            asked = sa.select(Job.id).where(Job.id.in_(there), Job.status.not_in(FINAL))
            wanted = set(session.scalars(asked))
        for name in there.keys() - wanted:
            shutil.rmtree(there[name], ignore_errors=True)

    def _lost(self, job: Job, error: Exception) -> None:
        patiently(lambda: self.queue.lost(job.id, f"its worker had an error ({type(error).__name__})"))

    def asked(self) -> str | None:
        """What is wanted of the job at hand."""
        return "leave" if self.leaving.is_set() and self._status == "running" else self._status

    def _beat(self) -> None:
        """Signs of life, from a thread of their own; a status is read often, since people wait for it."""
        while True:
            job = self._job
            try:
                status = self.queue.beat(job.id if job else None)
                if job is not None and job is self._job:
                    self._status = status
            except Exception as error:  # the database is away; the lease is nobody's until it is back
                log.warning("no heartbeat: %s", type(error).__name__)
            threading.Event().wait(min(1.0 if job else 5.0, self.queue.lease / 4))


def capacity_of(settings: ServiceSection) -> Capacity:
    """What this machine's jobs may take together."""
    cores = settings.cores or len(os.sched_getaffinity(0))
    memory = round(settings.memory_gib * GIB) if settings.memory_gib else psutil.virtual_memory().total
    return Capacity(cores, memory, gpus())


def gpus() -> int:
    """How many NVIDIA devices the system shows, without loading torch."""
    from pathlib import Path

    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def main() -> None:
    """`python -m tunesmith.jobs.worker PARENT`, the settings as JSON on standard input. Where the parent dies, it is
    asked to stop, as by a SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    settings = ServiceSection.model_validate_json(sys.stdin.read())
    end_with(int(sys.argv[1]), signal.SIGTERM)
    Worker(open_service(settings)).run()


if __name__ == "__main__":
    main()
