"""The server around the application: addresses, certificates, logs, and an end that lets answers finish."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from tunesmith.api.app import SERVING, State, build
from tunesmith.api.auth import is_local
from tunesmith.api.connection import Connection
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


@dataclass(frozen=True)
class Place:
    """Where a server listens. `certificate` and `key` are files, for TLS."""

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    key: Path | None = None

    def url(self, port: int) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.certificate else 'http'}://{host}:{port}"

    def bound(self) -> list[socket.socket]:
        """The address's sockets, taken before anything is loaded. They don't listen yet, so nobody waits at them.

        Raises:
            RunError: there is no such address here, or another process has it.
        """
        found: list[socket.socket] = []
        try:
            every = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, proto, _, (host, port, *more) in dict.fromkeys(every):
                one = socket.socket(family, kind, proto)
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                found.append(one)
                one.bind((host, port or (found[0].getsockname()[1] if len(found) > 1 else 0), *more))
        except OSError as error:
            for one in found:
                one.close()
            raise self.refused(error) from error
        return found

    def refused(self, error: OSError) -> RunError:
        taken = error.errno == errno.EADDRINUSE
        return RunError(
            "another process listens there already" if taken else f"can't be listened at ({error.strerror or error})",
            where=f"{self.host}:{self.port}",
            fix="Give another port (--port), or end that process." if taken else "Give an address of this machine.",
        )


def serve(
    state: State,
    place: Place,
    routers: Sequence[str] = SERVING,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM or SIGINT; answers that have begun are finished first. `ready` gets the address once it
    is listened at.

    Raises:
        RunError: everybody could reach it and nobody needs a key; the address is taken; a certificate can't be used.
        TunesmithError: a model can't be loaded.
    """
    state.local = is_local(place.host)
    if not state.local and not state.keys and state.store is None:
        raise RunError(
            "others could reach this server, and nobody would need a key",
            where=f"--host {place.host}",
            fix="Give one: --key KEY, or TUNESMITH_KEY in the environment.",
        )
    config = uvicorn.Config(
        build(state, routers),
        http=Connection,
        log_config=None,
        access_log=False,
        ssl_certfile=place.certificate,
        ssl_keyfile=place.key,
        timeout_graceful_shutdown=round(state.settings.deadline),
        server_header=False,
    )
    _load(config, place)
    sockets = place.bound()
    server = Server(config)
    server.state, server.ready = state, lambda: ready(place.url(sockets[0].getsockname()[1]))
    log_to(sys.stderr)

    def told_elsewhere(record: logging.LogRecord) -> bool:
        return state.failure is None  # which is raised below: a sentence, not uvicorn's traceback

    noisy = logging.getLogger("uvicorn.error")
    noisy.addFilter(told_elsewhere)
    try:
        with contextlib.suppress(SystemExit):  # what went wrong is told below
            server.run(sockets)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise place.refused(error) from error  # one that was started at the same moment was faster
    finally:
        noisy.removeFilter(told_elsewhere)
        for one in sockets:
            one.close()
    if state.failure is not None:
        raise state.failure
    if not server.started:
        raise RunError("the server did not start", where=place.host, fix="The lines above say why.")


def _load(config: uvicorn.Config, place: Place) -> None:
    """Read the certificate, if there is one."""
    for file in (place.certificate, place.key):
        if file is not None and not file.is_file():
            raise RunError("is not there", where=str(file), fix="Give the files of a certificate and its key.")
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise RunError(
            f"can't be used as a certificate and its key ({error.strerror or error})",
            where=f"{place.certificate}, {place.key}",
            fix="Give PEM files: the certificate, and the private key that belongs to it.",
        ) from error


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
