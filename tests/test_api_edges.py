"""Requests at the edge: many answers at once, schemas that refer to themselves, other sites' pages, deep nesting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

from tests.scripted import HERMES, Scripted, asked_text, scripted, state_of
from tunesmith.api.app import build
from tunesmith.errors import ModelError
from tunesmith.inference.served import EngineError, Piece, Request
from tunesmith.serve.section import RouteSection
from tunesmith.serve.streams import merged

HI: list[Any] = [{"role": "user", "content": "What colour is it?"}]


def served(*engines: Scripted, **settings: Any) -> TestClient:
    return TestClient(build(state_of(*engines, **settings)))


def chat(http: TestClient, **more: Any) -> Any:
    return http.post("/v1/chat/completions", json={"model": "scripted", "messages": HI} | more)


def test_many_streams_take_as_few_tasks_as_run_at_once() -> None:
    most, ended = 0, 0

    async def stream(number: int) -> AsyncGenerator[int, None]:
        nonlocal most, ended
        try:
            most = max(most, len(asyncio.all_tasks()))
            await asyncio.sleep(0)
            yield number
        finally:
            ended += 1

    async def through() -> None:
        nonlocal ended
        found = [n async for n in merged([stream(i) for i in range(500)], 4)]
        assert sorted(found) == list(range(500)) and ended == 500 and most <= 4 + 2
        ended = 0
        streams = [stream(i) for i in range(500)]
        some = merged(streams, 4)
        assert await anext(some) == 0
        await some.aclose()
        assert ended < 500 and all(s.ag_frame is None for s in streams)  # closed, those too that never began

    asyncio.run(through())


HALF = "a\ud83d"  # a letter's first half alone, which JSON can spell
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        ("chat/completions", {"messages": [*HI, {"role": "tool", "content": "x", "tool_call_id": HALF}]}),
        ("chat/completions", {"messages": HI, "stop": HALF, "stream": True}),
        ("chat/completions", {"messages": HI, "user": HALF}),
        ("chat/completions", {"messages": HI, HALF: 1}),
        (
            "chat/completions",
            {"messages": HI, "tools": [{**TOOL, "function": {**TOOL["function"], "description": HALF}}]},
        ),
        ("completions", {"prompt": ["a", HALF]}),
        ("embeddings", {"input": HALF}),
        ("load_lora_adapter", {"lora_name": HALF, "lora_path": HALF}),
        ("feedback", {"id": "chatcmpl-1", "comment": HALF}),
    ],
)
def test_half_of_a_letter_is_no_text(path: str, body: dict[str, Any]) -> None:
    with served(scripted(template=HERMES)) as http:
        spelt = json.dumps({"model": "scripted"} | body).encode()
        for content in (spelt, spelt.replace(b"\\ud83d", b"\xed\xa0\xbd"), json.dumps(body).encode("utf-16")):
            refused = http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
            assert refused.status_code == 400, refused.text
            error = refused.json()["error"]
            assert error["code"] == "invalid_json" and "half of a letter" in error["message"]
        whole = spelt.replace(b"\\ud83d", b"\\ud83d\\ude00")
        refused = http.post(f"/v1/{path}", content=whole, headers={"content-type": "application/json"})
        assert "half of a letter" not in refused.text and refused.status_code < 500


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "\\ud83d"}'}}


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ({"role": "user"}, 400),
        ({"role": "user", "content": None}, 400),
        ({"role": "user", "content": 5}, 400),
        ({"role": "user", "content": True}, 400),
        ({"role": "user", "content": {}}, 400),
        ({"role": "user", "content": {"type": "text", "text": "Hi"}}, 400),
        ({"role": "user", "content": [5]}, 400),
        ({"role": "user", "content": [None]}, 400),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, 400),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}, 400),
        ({"role": "user", "content": []}, 200),
        ({"role": "user", "content": ""}, 200),
        ({"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, 200),
        ({"role": "user", "content": "\x00\uffff\U0010fffd"}, 200),
        ({"role": "assistant", "content": None}, 400),
        ({"role": "assistant", "tool_calls": [CALL]}, 200),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, 200),
        ({"role": "assistant", "content": None, "tool_calls": []}, 400),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function"}]}, 400),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, 400),
        ({"role": "tool", "content": "sunny", "tool_call_id": 1}, 400),
    ],
)
@pytest.mark.parametrize("template", [HERMES, None])
def test_contents_of_every_kind(message: dict[str, Any], status: int, template: str | None) -> None:
    with served(scripted(template=template)) as http:
        answer = chat(http, messages=[*HI, message])
        assert answer.status_code == status, answer.text
        if status == 400:
            assert answer.json()["error"]["param"].startswith("messages.1")


def test_answers_to_one_request_have_an_end() -> None:
    with served(scripted("Yes.")) as http:
        body = {"model": "scripted", "prompt": [[5]] * 64, "max_tokens": 1}
        refused = http.post("/v1/completions", json=body | {"n": 5})
        assert refused.status_code == 400 and "320" in refused.json()["error"]["message"]
        assert len(http.post("/v1/completions", json=body | {"n": 4}).json()["choices"]) == 256


TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Node"}, "$ref": {"type": "string"}},
    "required": ["root"],
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"leaf": {"$ref": "#/definitions/Leaf"}, "next": {"$ref": "#/$defs/Node"}},
            "additionalProperties": False,
        }
    },
    "definitions": {"Leaf": {"enum": ["oak", "elm"]}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": TREE}} for name in ("grow", "fell")]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "fell"}}, "auto"])
def test_schemas_that_refer_to_themselves_hold_for_calls(choice: Any) -> None:
    llguidance = pytest.importorskip("llguidance")
    call = {"name": "fell", "arguments": {"root": {"leaf": "oak", "next": {"leaf": "elm"}}}}
    engine = scripted(json.dumps(call), HERMES, context=4096)
    more: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice}
    if choice == "auto":
        more["response_format"] = {"type": "json_schema", "json_schema": {"name": "tree", "schema": TREE}}
    with served(engine) as http:
        message = chat(http, **more).json()["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == call["arguments"]
    schema = engine.asked[-1].grammar
    assert schema is not None
    jsonschema.validate(call, schema)
    for wrong in ({"root": {"leaf": "ash"}}, {"root": {"next": {"next": {"leaf": 1}}}}, {"root": {}, "$ref": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(call | {"arguments": wrong}, schema)
    matcher = llguidance.LLMatcher
    assert not matcher.validate_grammar(matcher.grammar_from_json_schema(json.dumps(schema)))


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "foreign_host"),
        ({"host": "127.0.0.1.evil.example:8000"}, "foreign_host"),
        ({"origin": "https://evil.example"}, "foreign_origin"),
        ({"origin": "null"}, "foreign_origin"),
        ({"sec-fetch-site": "cross-site"}, "foreign_origin"),
        ({"sec-fetch-site": "same-site"}, "foreign_origin"),
        ({"content-type": "text/plain"}, "invalid_json"),
        ({"content-type": ""}, "invalid_json"),
        ({"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"origin": "https://app.example", "sec-fetch-site": "cross-site"}, None),
        ({}, None),
    ],
)
def test_without_keys_no_other_sites_page_is_let_in(headers: dict[str, str], code: str | None) -> None:
    engine = scripted()
    with served(engine, cors=("https://app.example",)) as http:
        body = json.dumps({"model": "scripted", "messages": HI})
        headers = {"content-type": "application/json"} | headers
        done = http.post("/v1/chat/completions", content=body, headers={k: v for k, v in headers.items() if v})
    if code is None:
        assert done.status_code == 200, done.text
    else:
        assert done.status_code in (400, 403) and done.json()["error"]["code"] == code and not engine.asked


def test_with_a_key_any_name_and_origin_is_let_in() -> None:
    with served(scripted(), keys=("sk-1",)) as http:
        headers = {"host": "api.example", "origin": "https://app.example", "authorization": "Bearer sk-1"}
        body = {"model": "scripted", "messages": HI}
        assert http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200


def test_the_longest_answer_of_requests_that_name_none_is_what_the_context_leaves() -> None:
    engine = scripted()
    with served(engine, max_new_tokens=500) as http:
        assert chat(http).status_code == 200
        assert engine.asked[-1].max_new_tokens == 512 - len(engine.asked[-1].prompt) < 500
        assert chat(http, max_tokens=500).json()["error"]["code"] == "context_length_exceeded"
    with served(engine, max_new_tokens=3) as http:
        assert chat(http).json()["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_of_tokens_without_text_are_told() -> None:
    class Whole(Scripted):
        """Its tokens come without text, which comes at the end: each may have been half of a letter."""

        async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
            pieces = [piece async for piece in super().stream(request)]
            for piece in pieces[:-1]:
                yield replace(piece, text="")
            yield replace(pieces[-1], text="".join(p.text for p in pieces))

    engine = Whole(scripted().renderer, lambda _: "Yes.")
    with served(engine) as http:
        body = {"model": "scripted", "prompt": "?", "logprobs": 1, "max_tokens": 9}
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"]
        lines = http.post("/v1/completions", json=body | {"stream": True}).text.splitlines()
    told = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert [t for choice in told for t in choice["logprobs"]["tokens"]] == whole and len(whole) > 2


def test_a_prompts_cached_tokens_count_once() -> None:
    with served(scripted()) as http:
        assert chat(http, n=3).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
        body = {"model": "scripted", "prompt": ["a", "b"], "n": 2}
        assert http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": {"a": 1}, "arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 200_000 + "</tool_call>",
        "<tool_call><function=grow><parameter=root>" + "[" * 200_000 + "</parameter></function></tool_call>",
    ],
    ids=["name", "deep", "deep-argument"],
)
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    from tunesmith.serve.tools import Format, Reader

    reader = Reader(Format(), TOOLS)
    shown, calls = reader.feed(text, True)
    assert (shown == text and not calls) or "function=" in text


def test_tools_can_be_called_where_any_json_is_asked_for() -> None:
    engine = scripted('{"name": "fell", "arguments": {"root": {}}}', HERMES, context=4096)
    with served(engine) as http:
        choice = chat(http, tools=TOOLS, response_format={"type": "json_object"}).json()["choices"][0]
        assert engine.asked[-1].grammar == {}
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["tool_calls"][0]["function"]["name"] == "fell"


def test_a_name_holds_no_line_break_and_pages_may_read_when_to_come_again() -> None:
    with served(scripted(), cors=("https://app.example",)) as http:
        body = {"lora_name": "a\r\nset-cookie: b", "lora_path": "/nowhere"}
        assert http.post("/v1/load_lora_adapter", json=body).json()["error"]["param"] == "lora_name"
        exposed = http.get("/health", headers={"origin": "https://app.example"}).headers
        assert "retry-after" in exposed["access-control-expose-headers"]


# Embeddings, limits, fallbacks, models that come


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
        refused = chat(http, messages=[{"role": "user", "content": "many words " * 1000}])
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
            assert chat(http, messages=[{"role": "user", "content": text}]).status_code == 200
            assert chat(http).status_code == 200
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
            assert chat(http, temperature=0).headers["x-tunesmith-cache"] == hit


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
        assert chat(http, model="r").json()["choices"][0]["message"]["content"] == "From two."
        assert chat(http, model="s").status_code == 200
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
            got = chat(http, model="far", logprobs=True, max_tokens=20)
            choice = got.json()["choices"][0]
            assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello there", "stop")
            assert choice["logprobs"]["content"][0]["logprob"] == -0.5 and bodies[0]["logprobs"] is True
            assert got.json()["usage"]["completion_tokens"] == 9 and got.json()["usage"]["prompt_tokens"] == 4
            assert got.headers["x-tunesmith-model"] == "big" and "127.0.0.1" not in got.text
            done[0] = False
            assert chat(http, model="far").status_code >= 500
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
