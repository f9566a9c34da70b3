"""What has to be done from time to time: files and uploads whose time is over, and webhooks."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from types import TracebackType

import sqlalchemy as sa

from tunesmith.jobs import board, sweep, webhooks
from tunesmith.jobs.artifacts import file_key
from tunesmith.jobs.service import Service
from tunesmith.store import tables as t
from tunesmith.store.audit import record

log = logging.getLogger("tunesmith.chores")
EVERY = 1.0


def expire(service: Service) -> int:
    """Delete files and uploads whose time is over, their bytes too; returns how many. Jobs that run keep theirs."""
    now, gone = int(time.time()), 0
    with service.store.read() as session:
        files = list(session.scalars(sa.select(t.File).where(t.File.expires_at <= now)))
        waiting = t.Upload.status.in_(("pending", "completing"))
        uploads = list(session.scalars(sa.select(t.Upload).where(waiting, t.Upload.expires_at <= now)))
    for file in files:
        with service.store.write() as session:
            if session.scalar(sa.select(t.File.n).where(t.File.id == file.id).with_for_update()) is None:
                continue
            uses = sa.or_(t.Job.training_file == file.id, t.Job.validation_file == file.id)
            if session.scalar(sa.select(t.Job.n).where(uses, t.Job.status.not_in(board.FINAL))) is not None:
                continue
            session.execute(sa.delete(t.File).where(t.File.id == file.id))
            record(session, file.project, None, "file.expire", file.id)
        service.forget(file_key(file.id))
        gone += 1
    for upload in uploads:
        with service.store.write() as session:
            session.execute(sa.update(t.Upload).where(t.Upload.id == upload.id).values(status="expired"))
        service.forget(f"uploads/{upload.id}")
        gone += 1
    return gone


class Chores:
    """Does them in a thread while it is entered."""

    def __init__(self, service: Service) -> None:
        self.service, self._stop = service, threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        swept = -sweep.EVERY
        while not self._stop.wait(EVERY):
            try:
                if time.monotonic() >= swept + sweep.EVERY:
                    swept = time.monotonic()
                    sweep.sweep(self.service)
                while webhooks.deliver(self.service.store, self.service.settings.private_webhooks):
                    pass
                expire(self.service)
            except Exception as error:  # the database may be away for a while
                log.warning("chores were left: %s", type(error).__name__)

    async def __aenter__(self) -> Chores:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        with contextlib.suppress(RuntimeError):
            self._thread.join(timeout=webhooks.TIMEOUT)
