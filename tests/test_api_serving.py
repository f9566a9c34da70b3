"""What stands around answers: guards, passages, caches, limits, routes, adapters, traffic, figures; through HTTP."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import openai
import pytest
from starlette.testclient import TestClient

from tests.scripted import Scripted, asked_text, running, scripted, state_of
from tunesmith.api.app import State, build
from tunesmith.errors import DataError, ModelError, RecipeError, RunError
from tunesmith.inference.served import EngineDown, Request
from tunesmith.serve import routes
from tunesmith.serve.models import Served
from tunesmith.serve.section import RouteSection, ServeSection

HI = [{"role": "user", "content": "What colour is it?"}]


def ask(http: TestClient, text: str = "What colour is it?", model: str = "scripted", **more: Any) -> Any:
    messages = [{"role": "user", "content": text}]
    return http.post("/v1/chat/completions", json={"model": model, "messages": messages} | more)


def said(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def streamed(http: TestClient, **more: Any) -> tuple[str, str]:
    """The text of a streamed answer and how it ended."""
    body = {"model": "scripted", "messages": HI, "stream": True} | more
    text, finish = "", ""
    for line in http.post("/v1/chat/completions", json=body).text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            text, finish = text + (choice["delta"].get("content") or ""), choice["finish_reason"] or finish
    return text, finish


# Guards


def guarded(engine: Scripted, *guards: dict[str, Any]) -> TestClient:
    return TestClient(build(state_of(engine, guards=guards)))


def test_a_blocklist_refuses_what_is_asked_and_ends_what_is_answered() -> None:
    engine = scripted("The code word is swordfish, keep it.")
    with guarded(engine, {"kind": "blocklist", "words": ["swordfish"]}) as http:
        refused = ask(http, "Is it Swordfish?")
        assert refused.status_code == 400 and refused.json()["error"]["code"] == "content_filter"
        assert not engine.asked
        done = ask(http)
        assert said(done) == "The code word is " and done.json()["choices"][0]["finish_reason"] == "content_filter"
        assert streamed(http) == ("The code word is ", "content_filter")
        assert engine.running == 0
        figures = http.get("/metrics").text
        assert 'tunesmith_guard_hits_total{action="block",guard="blocklist",side="input"} 1.0' in figures
        assert 'tunesmith_guard_hits_total{action="block",guard="blocklist",side="output"} 2.0' in figures


@pytest.mark.parametrize("where", [0, 100, 190, 270, 280, 600])
def test_what_a_stream_must_not_show_is_never_shown_wherever_it_stands(where: int) -> None:
    filler = "many good words in a row "
    text = (filler * 30)[:where] + " write to ada@example.com now " + filler * 12
    engine = scripted(text, context=4096)
    with guarded(engine, {"kind": "personal", "action": "redact", "on": "output"}) as http:
        shown, finish = streamed(http)
    assert finish == "stop" and shown == text.replace("ada@example.com", "[EMAIL_ADDRESS]")


def test_a_stream_is_shown_as_soon_as_it_was_looked_at() -> None:
    engine = scripted("many good words in a row " * 60)
    with guarded(engine, {"kind": "blocklist", "words": ["swordfish"]}) as http:
        body = {"model": "scripted", "messages": HI, "stream": True}
        lines = [x for x in http.post("/v1/chat/completions", json=body).text.splitlines() if '"content":"' in x]
    assert len(lines) > 5


def test_secrets_and_personal_data_are_taken_out_of_what_the_model_sees() -> None:
    engine = scripted()
    key = "sk-proj-abcdefghijklmnopqrstuvwxyz123456"
    with guarded(
        engine,
        {"kind": "personal", "action": "redact", "on": "input"},
        {"kind": "secrets", "action": "redact", "on": "input"},
    ) as http:
        done = ask(http, f"My mail is ada@example.com and my key {key}.")
    assert said(done) == "Blue it is."
    assert "ada@example.com" not in asked_text(engine) and key not in asked_text(engine)
    assert "[EMAIL_ADDRESS]" in asked_text(engine) and "[SECRET]" in asked_text(engine)
    assert done.headers["x-tunesmith-guards"] == "personal:EMAIL_ADDRESS, secrets"


def test_json_that_is_redacted_is_still_json_and_calls_are_looked_at_too() -> None:
    tool = {"type": "function", "function": {"name": "mail", "parameters": {"type": "object"}}}
    call = '<tool_call>{"name": "mail", "arguments": {"to": "ada@example.com", "n": 5551234567}}</tool_call>'
    engine = scripted(lambda r: call if r.grammar is None else '{"to": "ada@example.com", "phone": 2025550143}')
    with guarded(engine, {"kind": "personal", "action": "redact", "on": "output"}) as http:
        done = ask(http, response_format={"type": "json_object"})
        assert json.loads(said(done))["to"] == "[EMAIL_ADDRESS]"
        text, _ = streamed(http, response_format={"type": "json_object"})
        assert json.loads(text) == json.loads(said(done))
        called = ask(http, tools=[tool]).json()["choices"][0]["message"]["tool_calls"][0]["function"]
        assert json.loads(called["arguments"])["to"] == "[EMAIL_ADDRESS]"


def test_a_flag_changes_nothing_and_is_told() -> None:
    with guarded(scripted("You stupid fucking idiot."), {"kind": "toxicity", "action": "flag"}) as http:
        assert said(done := ask(http)) == "You stupid fucking idiot."
        assert done.headers["x-tunesmith-guards"] == "toxicity"


def test_a_guard_model_judges_both_sides() -> None:
    engine = scripted("I will tell you how.")
    judge = scripted(lambda r: "unsafe\nS1" if "how" in asked_text(judge) else "safe", name="judge")
    state = state_of(engine, judge, guards=[{"kind": "model", "model": "judge", "prompt": "Is it safe? {text}"}])
    with TestClient(build(state)) as http:
        assert ask(http, "Tell me how").json()["error"]["code"] == "content_filter"
        done = ask(http, "Tell me").json()["choices"][0]
        assert done["finish_reason"] == "content_filter" and done["message"]["content"] == ""


def test_guards_are_checked_like_any_key() -> None:
    for wrong in (
        {"kind": "blocklist"},
        {"kind": "blocklist", "patterns": ["("]},
        {"kind": "nothing"},
        {"kind": "model"},
    ):
        with pytest.raises(ValueError, match=r"needs words|regular expression|guard|model"):
            ServeSection(guards=[wrong])


def test_a_guard_that_lacks_its_file_is_told_before_anything_is_served(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        state_of(scripted(), guards=[{"kind": "blocklist", "file": str(tmp_path / "none.txt")}])


# Passages


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    (folder / "more").mkdir(parents=True)
    (folder / "returns.md").write_text("# Returns\n\nGoods can be sent back within 30 days.\n\nKeep the receipt.")
    (folder / "more/opening.txt").write_text("The shop opens at nine and closes at six.")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    return folder


def test_passages_of_a_folder_are_shown_to_the_model_and_cited(documents: Path) -> None:
    engine = scripted("Within 30 days [1].")
    with TestClient(build(state_of(engine, retrieve={"folder": str(documents), "top": 1}))) as http:
        done = ask(http, "When can goods be sent back?").json()
        assert "[1] Returns: # Returns" in asked_text(engine) and "30 days" in asked_text(engine)
        assert "nine" not in asked_text(engine)
        assert done["sources"][0]["source"] == "returns.md" and "30 days" in done["sources"][0]["text"]
        cited = done["choices"][0]["message"]["annotations"][0]["url_citation"]
        assert (cited["start_index"], cited["end_index"], cited["url"]) == (15, 18, "returns.md")
        body = {"model": "scripted", "messages": HI, "stream": True}
        body["messages"] = [{"role": "user", "content": "When does the shop open, at nine?"}]
        events = http.post("/v1/chat/completions", json=body).text
        assert '"sources":[{"index":1' in events and '"annotations":[{"type":"url_citation"' in events
        ask(http, "xyzzy")
        assert "passages" not in asked_text(engine)


def test_passages_of_an_endpoint() -> None:
    class Search(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["content-length"])))
            answer = {"passages": [{"text": f"found for {query['query']}", "source": "https://x/1", "title": "One"}]}
            self.send_response(500 if "fail" in query["query"] else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None:
            pass

    search = HTTPServer(("127.0.0.1", 0), Search)
    Thread(target=search.serve_forever, daemon=True).start()
    engine = scripted()
    url = f"http://127.0.0.1:{search.server_address[1]}/"
    with TestClient(build(state_of(engine, retrieve={"url": url}))) as http:
        assert said(ask(http, "Where?")) == "Blue it is." and "[1] One: found for Where?" in asked_text(engine)
        failed = ask(http, "fail")
        assert failed.status_code == 503 and failed.json()["error"]["code"] == "retrieval_failed"
    search.shutdown()


# The cache


@pytest.fixture
def redis(monkeypatch: pytest.MonkeyPatch) -> str:
    import fakeredis
    from redis import asyncio as real

    server = fakeredis.FakeServer()
    for owner in (real, real.Redis):
        monkeypatch.setattr(owner, "from_url", lambda url, **_: fakeredis.FakeAsyncRedis(server=server))
    return "redis://cache:6379/0"


@pytest.mark.parametrize("kind", ["memory", "redis"])
def test_the_same_deterministic_request_is_answered_once(kind: str, request: pytest.FixtureRequest) -> None:
    keys = {"redis": request.getfixturevalue("redis")} if kind == "redis" else {}
    engine = scripted()
    with TestClient(build(state_of(engine, cache=keys))) as http:
        first, again = ask(http, temperature=0, logprobs=True), ask(http, temperature=0, logprobs=True)
        assert first.headers["x-tunesmith-cache"] == "miss" and again.headers["x-tunesmith-cache"] == "hit"
        assert first.json()["choices"] == again.json()["choices"] and len(engine.asked) == 1
        assert first.json()["usage"] == again.json()["usage"]
        assert streamed(http, temperature=0, logprobs=True) == ("Blue it is.", "stop") and len(engine.asked) == 1
        for other in ({"temperature": 0.5}, {"temperature": 0, "max_tokens": 3}, {"temperature": 0, "n": 2}):
            before = len(engine.asked)
            assert ask(http, **other).headers["x-tunesmith-cache"] == "miss"
            assert len(engine.asked) > before
        assert "tunesmith_cache_hits_total" in http.get("/metrics").text


def test_the_cache_forgets() -> None:
    engine = scripted()
    with TestClient(build(state_of(engine, cache={"seconds": 0.05}))) as http:
        ask(http, temperature=0)
        time.sleep(0.1)
        assert ask(http, temperature=0).headers["x-tunesmith-cache"] == "miss"
    assert len(engine.asked) == 2


# Limits


def test_a_key_may_ask_so_often_and_no_more() -> None:
    limits = {"requests_per_minute": 3}
    with TestClient(build(state_of(scripted(), keys=("sk-a", "sk-b"), limits=limits))) as http:
        http.headers["authorization"] = "Bearer sk-a"
        found = [ask(http).status_code for _ in range(4)]
        assert found == [200, 200, 200, 429]
        late = ask(http)
        assert 1 <= int(late.headers["retry-after"]) <= 60 and late.json()["error"]["code"] == "rate_limit_exceeded"
        http.headers["authorization"] = "Bearer sk-b"
        assert ask(http).status_code == 200


def test_limits_can_be_counted_in_redis_for_several_servers(redis: str) -> None:
    limits = {"requests_per_minute": 3, "redis": redis}
    with (
        TestClient(build(state_of(scripted(), limits=limits))) as one,
        TestClient(build(state_of(scripted(), limits=limits))) as other,
    ):
        assert [ask(http).status_code for http in (one, other, one, other)] == [200, 200, 200, 429]


def test_where_redis_does_not_answer_requests_are_answered_and_not_counted() -> None:
    away = {"redis": "redis://127.0.0.1:9/0"}
    state = state_of(scripted(), limits=away | {"requests_per_minute": 1, "tokens_per_day": 1}, cache=away)
    with TestClient(build(state)) as http:
        assert [ask(http, temperature=0).status_code for _ in range(3)] == [200] * 3


def test_a_key_has_so_many_tokens_a_day() -> None:
    with TestClient(build(state_of(scripted(), limits={"tokens_per_day": 40}))) as http:
        found = [ask(http).status_code for _ in range(4)]
        assert found[0] == 200 and found[-1] == 429
        assert ask(http).json()["error"]["code"] == "insufficient_quota"


# Routes


def test_weights_are_kept_and_users_stick() -> None:
    route = RouteSection(versions={"a": 3, "b": 1})
    dice = random.Random(1)
    drawn = Counter(routes.way(route, "r", None, dice).models[0] for _ in range(4000))
    assert 0.72 < drawn["a"] / 4000 < 0.78
    by_user = {u: routes.way(route, "r", f"user-{u}").models[0] for u in range(400)}
    assert by_user == {u: routes.way(route, "r", f"user-{u}").models[0] for u in range(400)}
    assert 0.68 < Counter(by_user.values())["a"] / 400 < 0.82
    assert routes.way(RouteSection(versions={"a": 1, "b": 0}), "r", None).models == ("a",)


def two(**more: Any) -> tuple[Scripted, Scripted]:
    return scripted("From one.", name="one", **more), scripted("From two.", name="two")


def test_a_route_goes_to_its_versions_and_says_which() -> None:
    with TestClient(build(state_of(*two(), routes=None, temperature=0))) as http:
        assert ask(http, model="support").status_code == 404
    section = {"support": {"versions": {"one": 1, "two": 1}}}
    engines = two()
    state = state_of(*engines)
    state.serving.routes = {n: RouteSection(**r) for n, r in section.items()}  # type: ignore[union-attr]
    with TestClient(build(state)) as http:
        found = {u: ask(http, model="support", user=f"u{u}").headers["x-tunesmith-model"] for u in range(30)}
        assert set(found.values()) == {"one", "two"}
        again = {u: ask(http, model="support", user=f"u{u}").headers["x-tunesmith-model"] for u in range(30)}
        assert again == found
        assert ask(http, model="support").json()["model"] == "support"
        assert "support" in [m["id"] for m in http.get("/v1/models").json()["data"]]


def test_a_fallback_answers_when_the_version_fails_and_nothing_was_shown_yet() -> None:
    def fail(request: Request, token: int) -> None:
        raise EngineDown("it died")

    one, other = two(fail=fail)
    with running(state_of(scripted("From far."))) as far:
        state = state_of(one, other)
        assert state.serving is not None
        state.serving.routes = {
            "near": RouteSection(versions={"one": 1}, fallback=("two",)),
            "far": RouteSection(versions={"one": 1}, fallback=(f"{far}/v1#scripted",)),
            "none": RouteSection(versions={"one": 1}),
            "gone": RouteSection(versions={"removed": 1}, fallback=("two",)),
        }
        with TestClient(build(state)) as http:
            assert said(done := ask(http, model="near")) == "From two." and done.headers["x-tunesmith-model"] == "two"
            assert said(done := ask(http, model="far")) == "From far."
            assert done.json()["usage"]["prompt_tokens"] > 0
            assert said(ask(http, model="gone")) == "From two."
            assert ask(http, model="none").status_code == 503
            assert ask(http, model="near", temperature=9).status_code == 400
            assert "tunesmith_fallbacks_total" in http.get("/metrics").text


def test_a_shadow_is_asked_the_same_and_changes_nothing() -> None:
    one, other = two()
    state = state_of(one, other)
    assert state.serving is not None
    state.serving.routes = {"support": RouteSection(versions={"one": 1}, shadow="two")}
    with TestClient(build(state)) as http:
        assert said(ask(http, model="support")) == "From one."
        end = time.monotonic() + 5
        while not other.asked and time.monotonic() < end:
            time.sleep(0.01)
        assert other.asked[0].prompt == one.asked[0].prompt
        other.fail = lambda request, token: (_ for _ in ()).throw(EngineDown("it died"))
        assert said(ask(http, model="support")) == "From one."


def test_promote_and_roll_back_while_serving(tunesmith: Any, tmp_path: Path) -> None:
    file = tmp_path / "routes.yaml"
    assert tunesmith("promote", "support", "one", "--routes", file).code == 0
    with TestClient(build(state_of(*two(), routes=file))) as http:

        def answers(text: str) -> bool:
            end = time.monotonic() + 5
            while time.monotonic() < end:
                if said(ask(http, model="support")) == text:
                    return True
                time.sleep(0.05)
            return False

        assert answers("From one.")
        done = tunesmith("promote", "support", "two", "--routes", file, "--json")
        assert done.json["versions"] == {"two": 1.0} and done.json["before"] == {"one": 1.0}
        assert answers("From two.")
        canary = tunesmith("promote", "support", "one", "--share", "0.25", "--routes", file, "--json").json
        assert canary["versions"] == {"two": 0.75, "one": 0.25}
        assert tunesmith("rollback", "support", "--routes", file).code == 0
        assert tunesmith("rollback", "support", "--routes", file, "--json").json["versions"] == {"one": 1.0}
        assert answers("From one.")
        file.write_text("support: {versions: nonsense}")
        time.sleep(1.1)
        assert said(ask(http, model="support")) == "From one."  # a broken file changes nothing
    refused = tunesmith("rollback", "other", "--routes", tmp_path / "none.yaml")
    assert refused.code == 2 and "no earlier versions" in refused.err


# Adapters


def test_adapters_come_and_go_while_others_answer(tmp_path: Path) -> None:
    engine = scripted(lambda r: f"I am {r.adapter}.")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "lora").mkdir(exist_ok=True)
        (tmp_path / "lora" / name).write_text("{}")
    with running(state_of(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        load = {"lora_name": "mine", "lora_path": str(tmp_path / "lora")}
        loaded = httpx2.post(f"{url}/v1/load_lora_adapter", json=load)
        assert loaded.status_code == 200 and "added successfully" in loaded.text
        assert [(m.id, m.to_dict()["parent"]) for m in client.models.list()] == [
            ("scripted", None),
            ("mine", "scripted"),
        ]
        done = client.chat.completions.create(model="mine", messages=HI)  # type: ignore[arg-type]
        assert done.choices[0].message.content == "I am mine."
        again = httpx2.post(f"{url}/v1/load_lora_adapter", json=load)
        assert again.status_code == 400 and again.json()["error"]["code"] == "model_exists"
        assert httpx2.post(f"{url}/v1/load_lora_adapter", json=load | {"load_inplace": True}).status_code == 200
        bad = httpx2.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc/../etc"})
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "lora_path"
        assert httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "scripted"}).status_code == 404
        assert httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="mine", messages=HI)  # type: ignore[arg-type]
        assert engine.loaded == {}


# Traffic and feedback


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    from tunesmith import store as stores

    opened = stores.open(f"sqlite:///{tmp_path}/traffic.db")
    yield opened
    opened.close()


def logged(state: State, work: Callable[[TestClient], Any]) -> Any:
    with TestClient(build(state)) as http:
        return work(http)


def test_traffic_is_kept_redacted_and_can_be_rated(store: Any) -> None:
    _, secret = store.keys.create("test", role="admin")
    engine = scripted("Write to bob@example.com.")

    def work(http: TestClient) -> str:
        http.headers["authorization"] = f"Bearer {secret}"
        done = ask(http, "I am ada@example.com", user="u1").json()
        rated = http.post("/v1/feedback", json={"id": done["id"], "rating": 1, "correction": "Call Bob."})
        assert rated.status_code == 200 and rated.json()["object"] == "feedback"
        assert http.post("/v1/feedback", json={"id": "chatcmpl-none", "rating": 1}).status_code == 404
        assert http.post("/v1/feedback", json={"id": done["id"]}).status_code == 400
        assert streamed(http)[0] == "Write to bob@example.com."
        return str(done["id"])

    answer = logged(state_of(engine, store=store), work)
    kept = store.traffic.get(answer)
    assert kept.model == "scripted" and kept.endpoint == "chat" and kept.user == "u1" and kept.status == 200
    assert kept.prompt_tokens > 0 and kept.completion_tokens > 0 and kept.seconds > 0
    assert kept.request["messages"][0]["content"] == "I am [EMAIL_ADDRESS]"
    assert kept.response["choices"][0]["content"] == "Write to [EMAIL_ADDRESS]."
    assert store.feedback.of(answer)[0].correction == "Call Bob."
    assert len(list(store.traffic.export())) == 2
    key = store.keys.every()[0]
    assert store.keys.spent(key.id) == sum(t.prompt_tokens + t.completion_tokens for t in store.traffic.export())


@pytest.mark.parametrize(("text", "kept"), [("none", None), ("full", "I am ada@example.com")])
def test_how_much_text_is_kept(store: Any, text: str, kept: str | None) -> None:
    _, secret = store.keys.create("test", role="admin")
    state = state_of(scripted(), store=store, traffic={"text": text})

    def work(http: TestClient) -> str:
        http.headers["authorization"] = f"Bearer {secret}"
        return str(ask(http, "I am ada@example.com").json()["id"])

    found = store.traffic.get(logged(state, work))
    assert (found.request["messages"][0]["content"] if found.request else None) == kept


def test_keys_of_the_store_have_roles_scopes_limits_and_quotas(store: Any) -> None:
    _, viewer = store.keys.create("v", role="viewer")
    _, files = store.keys.create("f", role="runner", scopes=("files",))
    _, slow = store.keys.create("s", role="runner", rpm=1)
    _, poor = store.keys.create("p", role="runner", token_quota=20)
    _, late = store.keys.create("l", role="runner", expires_at=int(time.time()) - 1)

    def work(http: TestClient) -> None:
        def by(secret: str) -> Any:
            http.headers["authorization"] = f"Bearer {secret}"
            return ask(http)

        assert by(viewer).status_code == 403 and http.get("/v1/models").status_code == 200
        assert by(files).status_code == 403 and http.get("/v1/models").status_code == 403
        assert [by(slow).status_code for _ in range(2)] == [200, 429]
        assert [by(poor).status_code, by(poor).status_code] == [200, 429]
        assert by(poor).json()["error"]["code"] == "insufficient_quota"
        assert by(late).status_code == 401 and by("sk-nobody").status_code == 401

    logged(state_of(scripted(), store=store), work)


def test_feedback_needs_a_database() -> None:
    with TestClient(build(state_of(scripted()))) as http:
        assert http.post("/v1/feedback", json={"id": "x", "rating": 1}).json()["error"]["code"] == "no_database"


# Health, figures, pages, certificates


def test_health_and_readiness() -> None:
    engine = scripted()
    with TestClient(build(state := state_of(engine))) as http:
        assert http.get("/health").json() == {"status": "ok", "engines": {"scripted": "ready"}}
        assert http.get("/ready").status_code == 200
        engine.state = "restarting"
        assert http.get("/ready").status_code == 503 and http.get("/health").status_code == 200
        engine.state, state.stopping = "ready", True
        assert http.get("/ready").status_code == 503


def test_figures_by_model_and_route() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    with TestClient(build(state_of(scripted()))) as http:
        done = ask(http).json()
        ask(http, model="none")
        found = {
            s.name: s.value
            for f in text_string_to_metric_families(http.get("/metrics").text)
            for s in f.samples
            if s.labels.get("model", "scripted") == "scripted" and s.labels.get("le") is None
        }
    assert found["tunesmith_requests_total"] == 1 and found["tunesmith_running"] == 0
    assert found["tunesmith_completion_tokens_total"] == done["usage"]["completion_tokens"]
    assert found["tunesmith_cached_tokens_total"] == 2 and found["tunesmith_engine_up"] == 1
    assert found["tunesmith_time_to_first_token_seconds_count"] == found["tunesmith_time_per_token_seconds_count"] == 1
    with TestClient(build(state_of(scripted(), keys=("sk-a",)))) as http:
        assert http.get("/metrics").status_code == 401
    with TestClient(build(state_of(scripted(), keys=("sk-a",), open_metrics=True))) as http:
        assert http.get("/metrics").status_code == 200


def test_pages_need_nothing_from_elsewhere() -> None:
    with TestClient(build(state_of(scripted(), keys=("sk-a",)))) as http:
        for path, kind in {
            "/": "text/html", "/docs": "text/html", "/assets/page.css": "text/css",
            "/assets/chat.js": "text/javascript", "/assets/docs.js": "text/javascript",
        }.items():  # fmt: skip
            page = http.get(path)
            assert page.status_code == 200 and page.headers["content-type"].startswith(kind)
            assert "default-src 'self'" in page.headers["content-security-policy"]
            assert "//cdn" not in page.text and 'src="http' not in page.text and "<script>" not in page.text
        for path in ("/assets/../app.py", "/assets/%2e%2e/app.py", "/assets/chat.html.py"):
            assert http.get(path).status_code == 404
        assert http.get("/openapi.json").json()["paths"]["/v1/chat/completions"]


def test_certificates(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with running(state_of(scripted()), ssl_certfile=str(cert), ssl_keyfile=str(key)) as url:
        import ssl

        context = ssl.create_default_context(cafile=str(cert))
        assert httpx2.get(f"{url}/health", verify=context).json()["status"] == "ok"


def test_chat_talks_with_a_server(tunesmith: Any) -> None:
    with running(state_of(scripted(), keys=("sk-a",))) as url:
        done = tunesmith("chat", "--url", url, "--key", "sk-a", "--say", "Hello", "--json")
        assert done.json == {"prompt": "Hello", "model": "scripted", "answer": "Blue it is."}
        refused = tunesmith("chat", "--url", url, "--key", "sk-b", "--say", "Hello")
        assert refused.code == 2 and "Incorrect API key" in refused.err
    silent = tunesmith("chat", "--url", "http://127.0.0.1:9", "--say", "Hello")
    assert silent.code == 2 and "does not answer" in silent.err
    assert "with which run?" in tunesmith("chat", "--say", "Hello").err


def test_a_stop_lets_answers_finish() -> None:
    engine = scripted("word " * 40, pause=0.02)
    with running(state_of(engine)) as url:
        body = {"model": "scripted", "messages": HI, "stream": True}
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            import tests.scripted as harness

            harness.LAST.should_exit = True
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and sum('"content":' in line for line in rest) > 30


def test_a_model_that_can_not_be_loaded_is_a_sentence(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.api import server

    monkeypatch.setattr(server, "log_to", lambda _: None)
    engine = scripted()

    async def start() -> None:
        raise ModelError("can't be read", where="model.gguf", fix="Check the file.")

    engine.start = start  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="can't be read"):
        server.serve(state_of(engine), port=0)
    assert "Traceback" not in capfd.readouterr().err
    with socket.socket() as taken, pytest.raises(RunError, match="did not start"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server.serve(state_of(scripted()), port=taken.getsockname()[1])


def test_the_api_needs_its_extra() -> None:
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from tunesmith.cli import main; sys.argv = ['tunesmith', 'serve', 'x']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "pip install 'tunesmith[serve]'" in done.stderr


def test_keys_of_serve_by_name() -> None:
    from tunesmith import recipe

    raw: dict[str, Any] = {"name": "x", "model": "m", "data": {"sources": [{"path": "p"}]}}
    built = recipe.build(raw, ["serve.engine.slots=4", "serve.cache={}", "serve.guards=[{kind: secrets}]"])
    assert built.serve.engine.slots == 4 and built.serve.cache is not None
    assert built.serve.guards[0].kind == "secrets"
    with pytest.raises(RecipeError, match="did you mean 'deadline'"):
        recipe.build(raw, ["serve.dedline=4"])


def test_a_version_that_is_not_there_is_opened_before_its_route_moves(tunesmith: Any, tmp_path: Path) -> None:
    one, other = two()
    file = tmp_path / "routes.yaml"
    assert tunesmith("promote", "support", "one", "--routes", file).code == 0
    state = state_of(one, routes=file)
    serving = state.serving
    assert serving is not None
    asked: list[str] = []

    async def fetch(name: str, force: bool) -> None:
        asked.append(name)
        if name != "two":
            raise RunError(f"no run '{name}'")
        serving.models.put(Served("two", other, other.renderer, identity="two"))
        await serving.models.begin()

    serving.fetch = fetch
    with TestClient(build(state)) as http:

        def until(text: str) -> None:
            end = time.monotonic() + 10
            while said(ask(http, model="support")) != text:
                assert time.monotonic() < end
                time.sleep(0.05)

        until("From one.")
        assert tunesmith("promote", "support", "nowhere", "--routes", file).code == 0
        time.sleep(1.2)
        until("From one.")
        assert tunesmith("rollback", "support", "--routes", file).code == 0
        assert tunesmith("promote", "support", "two", "--routes", file).code == 0
        until("From two.")
    assert asked == ["nowhere", "two"] and other.state == "failed"
