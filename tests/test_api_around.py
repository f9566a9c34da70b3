"""What stands around an answer: guards, passages, the cache, limits; through HTTP."""

from __future__ import annotations

import json
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.scripted import HI, Scripted, ask, asked_text, said, scripted, state_of, streamed
from tunesmith.api.app import build
from tunesmith.errors import DataError
from tunesmith.serve.section import ServeSection

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


def test_what_is_embedded_passes_the_guards_as_prompts_do() -> None:
    engine = scripted()
    read: list[str] = []

    async def embed(prompts: Any) -> list[list[float]]:
        read.extend(engine.renderer.tokenizer.decode(p) for p in prompts)
        return [[1.0] for _ in prompts]

    engine.embed = embed  # type: ignore[method-assign]
    ids = engine.renderer.text_ids("the word is swordfish")
    guards = [
        {"kind": "personal", "action": "redact", "on": "input"},
        {"kind": "blocklist", "words": ["swordfish"], "on": "input"},
    ]
    with guarded(engine, *guards) as http:

        def embedded(given: Any) -> Any:
            return http.post("/v1/embeddings", json={"model": "scripted", "input": given})

        done = embedded(["My mail is ada@example.com.", "Blue."])
        assert done.status_code == 200 and done.headers["x-tunesmith-guards"] == "personal:EMAIL_ADDRESS"
        assert read == ["My mail is [EMAIL_ADDRESS].", "Blue."]
        for wrong in ("a swordfish", ["fine", "Swordfish!"], ids, [ids]):
            error = embedded(wrong).json()["error"]
            assert error["code"] == "content_filter" and error["param"] == "input"
        assert len(read) == 2


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
