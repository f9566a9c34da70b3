"""The server around the application: addresses, certificates, logs, and an end that lets answers finish."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from tunesmith.api.app import State, build
from tunesmith.api.auth import is_local
from tunesmith.errors import RunError


class Server(uvicorn.Server):
    """uvicorn's, which says that it is not ready as soon as it is told to stop, and for which that is no failure."""

    state: State
    ready: Callable[[], None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started and self.ready is not None:
            self.ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.state.stopping = True
        super().handle_exit(sig, frame)


def serve(
    state: State,
    host: str = "127.0.0.1",
    port: int = 8000,
    certificate: Path | None = None,
    private_key: Path | None = None,
    routers: Any = None,
    ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; answers that have begun are finished first. `ready` is called once it listens.

    Raises:
        RunError: everybody could reach it and nobody needs a key, or a certificate's file is not there.
        TunesmithError: a model can't be loaded.
    """
    state.local = is_local(host)
    if not state.local and not state.keys and state.store is None:
        raise RunError(
            "others could reach this server, and nobody would need a key",
            where=f"--host {host}",
            fix="Give one: --key KEY, or TUNESMITH_KEY in the environment.",
        )
    for file in (certificate, private_key):
        if file is not None and not file.is_file():
            raise RunError("is not there", where=str(file), fix="Give the files of a certificate and its key.")
    app = build(state, routers) if routers else build(state)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
        timeout_graceful_shutdown=round(state.settings.deadline),
        server_header=False,
    )
    server = Server(config)
    server.state, server.ready = state, ready
    log_to(sys.stderr)

    def told_elsewhere(record: logging.LogRecord) -> bool:
        return state.failure is None  # which is raised below: a sentence, not uvicorn's traceback

    noisy = logging.getLogger("uvicorn.error")
    noisy.addFilter(told_elsewhere)
    try:
        with contextlib.suppress(SystemExit):  # what went wrong is told below
            server.run()
    finally:
        noisy.removeFilter(told_elsewhere)
    if state.failure is not None:
        raise state.failure
    if not server.started:
        raise RunError("the server did not start", where=f"{host}:{port}", fix="The lines above say why.")


def log_to(stream: Any) -> None:
    """A line a request as JSON, and what the server has to say."""
    plain = logging.StreamHandler(stream)
    plain.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    lines = logging.StreamHandler(stream)
    lines.setFormatter(logging.Formatter("%(message)s"))
    for name, handler in {"tunesmith": plain, "uvicorn": plain, "tunesmith.access": lines}.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
