"""The whole service from one command: the API with its models, and workers in processes of their own."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from tunesmith import recipe
from tunesmith.api.app import SERVING, State
from tunesmith.api.opening import Opening
from tunesmith.api.server import Place, serve
from tunesmith.api.tuned import Registry
from tunesmith.errors import RecipeError
from tunesmith.jobs.chores import Chores
from tunesmith.jobs.section import ServiceSection
from tunesmith.jobs.service import Service, open_service
from tunesmith.section import Section
from tunesmith.serve.models import Models
from tunesmith.serve.section import ServeSection
from tunesmith.serve.serving import Serving

log = logging.getLogger("tunesmith.up")
Role = Literal["all", "api", "worker"]
MANAGING = tuple(f"tunesmith.api.{name}" for name in ("files", "uploads", "jobs", "tuned", "admin"))
RESTART = 1.0  # seconds before a worker that has ended is started again, doubled each time
GRACE = 330.0  # seconds that workers have to finish a step and save


class Settings(Section):
    """A settings file."""

    service: ServiceSection = ServiceSection()
    serve: ServeSection = ServeSection()


def read_settings(path: Path | None, changes: dict[str, Any]) -> Settings:
    """A settings file with what the command line changes of it.

    Raises:
        RecipeError: a key that can't be meant.
    """
    keys: Any = recipe.read(path) if path else None
    keys, where = {} if keys is None else keys, str(path or "settings")
    if not isinstance(keys, dict):
        raise RecipeError("holds no settings", where=where, fix="Write YAML: service: and serve:.")
    parts = {name: {} if part is None else part for name, part in keys.items()}
    service = parts.get("service", {})
    try:
        return Settings.model_validate(parts | {"service": service | changes if isinstance(service, dict) else service})
    except ValidationError as error:
        raise RecipeError(recipe.told(error, parts, Settings), where=where, fix="All keys: docs/service.md.") from None


def up(settings: Settings, place: Place, role: Role, told: Callable[[dict[str, Any]], None]) -> None:
    """Run until it is asked to stop. `told` is given the address and, the first time, an admin's key.

    Raises:
        TunesmithError: something can't be opened.
    """
    if role == "worker":
        with workers(settings.service, max(settings.service.workers, 1)) as team:
            told({"workers": len(team.processes)})
            _until_asked()
        return
    service = open_service(settings.service)
    state = state_of(service, settings.serve)

    def ready(url: str) -> None:
        first = service.store.keys.first()  # no sooner, since it is told but once
        told({"url": url} | ({"admin_key": first} if first else {}))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the server takes them, and raises them again when it has ended
    with workers(settings.service, settings.service.workers if role == "all" else 0):
        serve(state, place, (*MANAGING, *SERVING), ready)
    service.store.close()


def state_of(service: Service, settings: ServeSection) -> State:
    """The service's state: its models answer, and what jobs make is added while it runs."""
    serving = Serving(settings, opened(service.settings, settings), service.settings.folder / "routes.yaml")
    state = State(settings=settings, serving=serving, store=service.store, service=service, local=False)
    state.registry = Registry(service, serving.models, settings.engine)
    state.parts.append(Chores(service))
    return state


def opened(settings: ServiceSection, serve: ServeSection) -> Models:
    """The base models, each with an engine."""
    opening = Opening(serve)
    for name, where in settings.models.items():
        opening.open(f"{name}={where}")
    return opening.models


class Team:
    """Workers that are started again when they end."""

    def __init__(self, settings: ServiceSection, count: int) -> None:
        self.settings, self.stopping = settings, threading.Event()
        self.processes: list[subprocess.Popen[bytes]] = [self._start() for _ in range(count)]
        self._waits = [RESTART] * count
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen[bytes]:
        folder = self.settings.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "workers.log").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.jobs.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a Ctrl-C is ours to hand on
            )
        assert process.stdin
        process.stdin.write(self.settings.model_dump_json().encode())
        process.stdin.close()
        return process

    def _watch(self) -> None:
        while not self.stopping.wait(0.5):
            for place, process in enumerate(self.processes):
                if process.poll() is not None and not self.stopping.wait(self._waits[place]):
                    log.warning("a worker ended with code %s; starting another", process.returncode)
                    self._waits[place] = min(self._waits[place] * 2, 60)
                    self.processes[place] = self._start()

    def stop(self) -> None:
        """Ask them to save and end, and wait for it."""
        self.stopping.set()
        self._thread.join()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, end - time.monotonic()))
            process.kill()


@contextlib.contextmanager
def workers(settings: ServiceSection, count: int) -> Iterator[Team]:
    team = Team(settings, count)
    try:
        yield team
    finally:
        team.stop()


def _until_asked() -> None:
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    while not asked.wait(1.0):
        pass
