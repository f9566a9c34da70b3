"""What stands behind an answer: embeddings, quotas, deadlines, fallbacks, endpoints, models that come and go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.scripted import Scripted, ask, asked_text, scripted, served, state_of
from tunesmith.api.app import build
from tunesmith.errors import ModelError
from tunesmith.inference.served import EngineError, Request
from tunesmith.serve.section import RouteSection


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    from tunesmith import store as stores

    opened = stores.open(f"sqlite:///{tmp_path}/keys.db")
    yield opened
    opened.close()


def test_what_can_not_fit_is_refused_before_anybody_reads_it() -> None:
    engine = scripted()
    state = state_of(engine)
    assert state.serving is not None
    read: list[int] = []
    state.serving._guards.asked = lambda messages: read.append(1)  # type: ignore[method-assign, assignment]
    with TestClient(build(state)) as http:
        refused = ask(http, messages=[{"role": "user", "content": "many words " * 1000}])
        assert refused.json()["error"]["code"] == "context_length_exceeded" and not read
        body = {"model": "scripted", "input": "many words " * 1000}
        error = http.post("/v1/embeddings", json=body).json()["error"]
        assert error["code"] == "context_length_exceeded" and error["param"] == "input"
        for words in (200, 1000):  # seen by its tokens, by its letters
            body = {"model": "scripted", "prompt": "many words " * words, "max_tokens": 500}
            error = http.post("/v1/completions", json=body).json()["error"]
            assert error["code"] == "context_length_exceeded" and error["param"] == "prompt"


def test_long_texts_are_read_beside_the_others() -> None:
    import threading

    engine = scripted(context=30_000)
    threads: list[Any] = []
    text = "many words " * 2500
    with served(engine) as http:
        real = type(engine.renderer).prompt

        def prompt(self: Any, *args: Any) -> list[int]:
            threads.append((threading.current_thread().name, self is engine.renderer))
            return real(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine.renderer), "prompt", prompt)
            assert ask(http, messages=[{"role": "user", "content": text}]).status_code == 200
            assert ask(http).status_code == 200
    assert text.strip() in asked_text(engine, 0)
    assert not threads[0][1] and threads[1][1] and threads[0][0] != threads[1][0]


def test_embeddings_count_for_quotas_come_in_batches_and_end_in_time(store: Any) -> None:
    class Slow(Scripted):
        most = 0

        async def embed(self, prompts: Any) -> list[list[float]]:
            self.most = max(self.most, len(prompts))
            await asyncio.sleep(self.pause)
            return await super().embed(prompts)

    engine = Slow(scripted().renderer, str)
    _, secret = store.keys.create("poor", role="runner", token_quota=30)
    with TestClient(build(state_of(engine, store=store, deadline=0.5))) as http:
        http.headers["authorization"] = f"Bearer {secret}"
        body = {"model": "scripted", "input": ["four words are here"] * 40}
        done = http.post("/v1/embeddings", json=body)
        assert len(done.json()["data"]) == 40 and 1 < engine.most <= 16
        refused = http.post("/v1/embeddings", json=body)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "insufficient_quota"
    engine.pause = 2.0
    with served(engine, deadline=0.2) as http:
        late = http.post("/v1/embeddings", json={"model": "scripted", "input": "a"})
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"


def test_a_client_that_goes_away_has_spent_what_it_asked_for() -> None:
    from tunesmith.api.answering import Events, Reply
    from tunesmith.serve.asked import Asked, Delta, Started

    spent: list[tuple[str, int]] = []
    kept: list[dict[str, Any]] = []

    class Traffic:
        def add(self, request: Any, response: Any, **about: Any) -> None:
            kept.append(about)

    class Limits:
        async def spend(self, key: str, tokens: int) -> None:
            await asyncio.sleep(0.01)
            spent.append((key, tokens))

    async def deltas() -> AsyncGenerator[Delta, None]:
        yield Delta(text="a", tokens=1)
        await asyncio.sleep(10)

    async def through(begun: bool) -> None:
        state = state_of(scripted())
        state.traffic, state.limits = Traffic(), Limits()  # type: ignore[assignment]
        who = type("Who", (), {"key": "k", "project": "p"})()
        app = type("App", (), {"state": type("S", (), {"tunesmith": state})()})()
        request: Any = type("R", (), {"app": app, "state": type("S", (), {"about": {}})()})()
        reply = Reply(request, who, "chat", "id", Asked("m"), {}, Started("m", 7, deltas()))
        if begun:  # cancelled while it waits for more, as when the client goes
            task = asyncio.create_task(reply.whole())
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        else:  # gone before anything was read

            async def none(*_: Any) -> Any:
                raise asyncio.CancelledError

            events = Events(_nothing(), reply)
            with pytest.raises(BaseException):  # noqa: B017
                await events({"type": "http", "asgi": {"spec_version": "2.4"}}, none, none)
        await asyncio.sleep(0.05)

    async def _nothing() -> AsyncGenerator[dict[str, Any], None]:
        return
        yield

    asyncio.run(through(True))
    asyncio.run(through(False))
    assert spent == [("k", 8), ("k", 7)] and [one["prompt_tokens"] for one in kept] == [7, 7]


def test_the_cache_of_one_project_is_no_others(store: Any) -> None:
    engine = scripted()
    keys = [
        store.keys.create(name, role="runner", project=store.keys.create_project(name).id)[1]
        for name in ("red", "blue")
    ]
    with TestClient(build(state_of(engine, store=store, cache={}))) as http:
        for key, hit in ((keys[0], "miss"), (keys[0], "hit"), (keys[1], "miss")):
            http.headers["authorization"] = f"Bearer {key}"
            assert ask(http, temperature=0).headers["x-tunesmith-cache"] == hit


def test_any_failure_of_an_engine_goes_to_the_fallback_and_a_shadow_has_a_deadline() -> None:
    import time

    def fail(request: Request, token: int) -> None:
        raise EngineError("it broke")

    one, two = scripted(name="one", fail=fail), scripted("From two.", name="two")
    slow = scripted("Slow. " * 50, name="slow", pause=0.2)
    state = state_of(one, two, slow, deadline=0.5)
    assert state.serving is not None
    state.serving.routes = {
        "r": RouteSection(versions={"one": 1}, fallback=("two",)),
        "s": RouteSection(versions={"two": 1}, shadow="slow"),
    }
    with TestClient(build(state)) as http:
        assert ask(http, model="r").json()["choices"][0]["message"]["content"] == "From two."
        assert ask(http, model="s").status_code == 200
        end = time.monotonic() + 10
        while not slow.running and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(1.0)
        assert slow.asked and not slow.running


def test_an_endpoint_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is not told, its own count of tokens counts, and an answer that has not ended is no answer."""
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    chunk = {"choices": [{"index": 0, "delta": {"content": "Hello there"}}]}
    likely = [{"token": "Hello", "logprob": -0.5, "bytes": None, "top_logprobs": []}]
    chunk["choices"][0]["logprobs"] = {"content": likely}
    usage = {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 9}}
    bodies: list[dict[str, Any]] = []
    done = [True]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()
            for event in (json.dumps(chunk), json.dumps(usage), *(["[DONE]"] if done[0] else [])):
                self.wfile.write(f"data: {event}\n\n".encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    state = state_of(scripted())
    assert state.serving is not None
    state.serving.routes = {"far": RouteSection(versions={"http://127.0.0.1:${PORT}/v1#big": 1})}
    monkeypatch.setenv("PORT", str(server.server_address[1]))
    try:
        with TestClient(build(state)) as http:
            got = ask(http, model="far", logprobs=True, max_tokens=20)
            choice = got.json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello there", "stop")
            assert choice["logprobs"]["content"][0]["logprob"] == -0.5 and bodies[0]["logprobs"] is True
            assert got.json()["usage"]["completion_tokens"] == 9 and got.json()["usage"]["prompt_tokens"] == 4
            assert got.headers["x-tunesmith-model"] == "big" and "127.0.0.1" not in got.text
            done[0] = False
            assert ask(http, model="far").status_code >= 500
    finally:
        server.shutdown()
        server.server_close()


def test_what_the_machine_lacks_is_the_servers_error() -> None:
    from tunesmith.api.errors import told
    from tunesmith.errors import DataError, MachineError, TrainingError

    assert [told(kind("no")).status for kind in (MachineError, TrainingError, DataError)] == [500, 500, 400]
    assert "no" not in told(MachineError("/secret/path")).message.split()


def test_models_that_come_answer_once_their_engine_has_started() -> None:
    from tunesmith.serve.models import Models, Served

    class Bad(Scripted):
        async def start(self) -> None:
            raise ModelError("no")

    async def through() -> None:
        models = Models()
        async with models:
            bad = Bad(scripted().renderer, str, name="bad")
            served = Served("bad", bad, bad.renderer)
            models.soon(served)
            assert "bad" not in models and models.taken("bad") and models.holds(served)
            with pytest.raises(ModelError):
                await models.begin()
            assert not models.taken("bad") and not models.holds(served)
            good = scripted(name="good")
            models.soon(Served("good", good, good.renderer))
            await models.begin()
            assert "good" in models and good.state == "ready"

    asyncio.run(through())


def test_an_older_promotion_never_undoes_a_newer_step(tmp_path: Any) -> None:
    import time

    from tunesmith.serve import routes, serving

    file = tmp_path / "routes.yaml"
    routes.promote(file, "support", "one")
    state = state_of(scripted("From one.", name="one"), routes=file)
    serve = state.serving
    assert serve is not None
    asked: list[tuple[str, bool]] = []
    slow = asyncio.Event()

    async def fetch(name: str, forced: bool) -> None:
        asked.append((name, forced))
        if name == "flaky" and len(asked) == 1:
            raise OSError("the disk")
        if name == "late":
            await slow.wait()

    async def through() -> None:
        serve.fetch = fetch

        async def look() -> None:
            serve._looked = 0.0
            serve._follow()
            await asyncio.sleep(0.01)

        routes.promote(file, "support", "flaky", forced="it is needed")
        await look()
        assert asked == [("flaky", True)] and serve.routes["support"].versions == {"one": 1.0}
        await look()
        assert len(asked) == 1  # not at once again
        serve._retry = time.monotonic()
        await look()
        assert asked == [("flaky", True)] * 2 and serve.routes["support"].versions == {"flaky": 1.0}
        routes.rollback(file, "support")
        await look()
        routes.promote(file, "support", "late")
        await look()
        routes.rollback(file, "support")
        await look()
        slow.set()
        await asyncio.sleep(0.01)
        assert serve.routes["support"].versions == {"one": 1.0} and serving.RETRY > 1

    asyncio.run(through())
