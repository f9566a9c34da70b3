"""The service for tests: its API in a thread of this process, without models that answer, and workers beside it.

A test file takes the fixtures at the end by name: `api, client = service.api, service.client`."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from tunesmith.api.app import State, build
from tunesmith.api.up import MANAGING, Team, workers
from tunesmith.jobs.chores import Chores
from tunesmith.jobs.section import ServiceSection
from tunesmith.jobs.service import Service, open_service

PATIENCE = 300.0  # seconds; this machine's other work may hold a test for long


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def chat(n: int = 24, word: str = "red") -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Item {i} is {word}. What colour is it?"},
                {"role": "assistant", "content": word},
            ]
        }
        for i in range(n)
    ]


def pairs(n: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "input": {"messages": [{"role": "user", "content": f"Item {i} is red. What colour is it?"}]},
            "preferred_output": [{"role": "assistant", "content": "red"}],
            "non_preferred_output": [{"role": "assistant", "content": "blue"}],
        }
        for i in range(n)
    ]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@dataclass
class Running:
    """A service whose API answers."""

    service: Service
    url: str
    secret: str

    def client(self, **key: Any) -> Any:
        """OpenAI's own client, with a new key if one is described."""
        secret = self.service.store.keys.create("test", **key)[1] if key else self.secret
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret, max_retries=0, timeout=PATIENCE)

    def upload(self, rows: list[Any] | None = None, client: Any = None) -> str:
        made = (client or self.client()).files.create(file=jsonl(chat() if rows is None else rows), purpose="fine-tune")
        id: str = made.id
        return id


@contextlib.contextmanager
def running(settings: ServiceSection) -> Iterator[Running]:
    service = open_service(settings)
    state = State(store=service.store, service=service, local=False)
    state.parts.append(Chores(service))
    port = free_port()
    app = build(state, MANAGING)
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", access_log=False, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait(lambda: server.started, "the API")
    secret = service.store.keys.create("admin", role="admin")[1]
    try:
        yield Running(service, f"http://127.0.0.1:{port}", secret)
    finally:
        server.should_exit = True
        thread.join()
        service.store.close()


@contextlib.contextmanager
def team(running: Running, count: int = 1) -> Iterator[Team]:
    with workers(running.service.settings, count) as found:
        yield found


def settings(folder: Path, model: Path, **more: Any) -> ServiceSection:
    return ServiceSection(home=str(folder / "service"), models={"tiny": str(model)}, **({"cores": 1} | more))


def wait(ready: Any, what: str, seconds: float = PATIENCE) -> Any:
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.05)
    return found


def finished(client: Any, id: str) -> Any:
    """The job, once it is over."""

    def over() -> Any:
        job = client.fine_tuning.jobs.retrieve(id)
        return job if job.status in ("succeeded", "failed", "cancelled") else None

    return wait(over, "the job's end")


def events(client: Any, id: str) -> list[Any]:
    """Oldest first."""
    return list(client.fine_tuning.jobs.list_events(id, limit=5))[::-1]


def refused(call: Any, kind: Any = None) -> dict[str, Any]:
    """The error's object, which has all four keys."""
    with pytest.raises(kind or openai.BadRequestError) as told:
        call()
    assert told.value.response.headers["x-request-id"]
    error: dict[str, Any] = told.value.response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert "Traceback" not in error["message"] and "/tmp" not in error["message"]
    return error


@pytest.fixture(scope="module")
def api(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service without a worker, for the tests of one file."""
    with running(settings(tmp_path_factory.mktemp("api"), tiny_model, max_file=200_000)) as found:
        yield found


@pytest.fixture
def client(api: Running) -> Any:
    return api.client()


@pytest.fixture(scope="module")
def file(api: Running) -> str:
    """A training file that is good."""
    return api.upload()
