"""Running the API: traffic, keys of the store, health, figures, pages, certificates, starting and stopping."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from tests.scripted import HI, ask, running, said, scripted, state_of, streamed
from tunesmith.api import frame, server
from tunesmith.api.app import State, build
from tunesmith.api.server import Place
from tunesmith.errors import ModelError, RecipeError, RunError

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


def test_answers_are_kept_for_so_many_days(store: Any) -> None:
    from tunesmith.store.answers import Answered

    for id, days in (("chatcmpl-old", 2.1), ("chatcmpl-young", 1.9)):
        store.traffic.add(Answered(id, "chat", "scripted", created_at=time.time() - days * 86_400))
    store.feedback.add("chatcmpl-old", rating=1)

    def work(http: TestClient) -> str:
        http.headers["authorization"] = "Bearer sk-a"
        return str(ask(http).json()["id"])

    answer = logged(state_of(scripted(), keys=("sk-a",), store=store, traffic={"days": 2}), work)
    assert [kept.id for kept in store.traffic.export()] == ["chatcmpl-young", answer]
    assert store.feedback.of("chatcmpl-old") == []


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


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def looked(state: State, place: Place, look: Callable[[str], None]) -> None:
    """`server.serve`, as the command runs it, until `look` has seen its address."""
    wrong: list[BaseException] = []

    def seen(url: str) -> None:
        try:
            look(url)
        except BaseException as error:
            wrong.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ready = lambda url: threading.Thread(target=seen, args=(url,), daemon=True).start()  # noqa: E731
        server.serve(state, place, ready=ready)
    finally:
        signal.signal(signal.SIGTERM, before)
    for error in wrong:
        raise error


def test_certificates(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "log_to", lambda _: None)
    known = ssl.create_default_context(cafile=str(certificate[0]))
    found: list[str] = []

    def look(url: str) -> None:
        found.append(url)
        assert httpx2.get(f"{url}/health", verify=known).json()["status"] == "ok"
        for wrong, verify in ((url, True), (url.replace("https", "http"), known)):  # nobody's, in clear
            with pytest.raises(httpx2.TransportError):
                httpx2.get(f"{wrong}/health", verify=verify)

    looked(state_of(scripted()), Place("127.0.0.1", 0, *certificate), look)
    assert found[0].startswith("https://127.0.0.1:")


def test_chat_talks_with_a_server(tunesmith: Any) -> None:
    with running(state_of(scripted(), keys=("sk-a",))) as url:
        done = tunesmith("chat", "--url", url, "--key", "sk-a", "--say", "Hello", "--json")
        assert done.json == {"prompt": "Hello", "model": "scripted", "answer": "Blue it is."}
        refused = tunesmith("chat", "--url", url, "--key", "sk-b", "--say", "Hello")
        assert refused.code == 2 and "Incorrect API key" in refused.err
    silent = tunesmith("chat", "--url", "http://127.0.0.1:9", "--say", "Hello")
    assert silent.code == 2 and "does not answer" in silent.err
    assert "with which run?" in tunesmith("chat", "--say", "Hello").err


@pytest.mark.parametrize("asked", [False, True])
def test_the_log_has_texts_only_where_asked_for(asked: bool, caplog: pytest.LogCaptureFixture) -> None:
    state = state_of(scripted(), **({"log_text": True} if asked else {}))
    with TestClient(build(state)) as http, caplog.at_level("INFO", "tunesmith.access"):
        said(ask(http, "my own words"))
        streamed(http)
        http.post("/v1/completions", json={"model": "scripted", "prompt": "my own words"})
        http.post("/v1/embeddings", json={"model": "scripted", "input": "my own words"})
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "tunesmith.access"]
    assert len(lines) == 4
    if not asked:
        assert "my own words" not in caplog.text and "Blue it is" not in caplog.text
        return
    assert lines[0]["asked"]["messages"] == [{"role": "user", "content": "my own words"}]
    assert [line["answered"]["choices"][0]["content"] for line in lines[:3]] == ["Blue it is."] * 3
    assert lines[2]["asked"]["prompt"] == lines[3]["asked"]["input"] == "my own words"


BEGUN = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
WHOLE = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        (BEGUN + b"Content-Length: 1000\r\n\r\n", b"{", b"HTTP/1.1 408"),
        (BEGUN + b"X-Slow: ", b"x", b"HTTP/1.1 408"),
        (WHOLE, b"G", b"HTTP/1.1 200"),  # and a 408 for what comes after it
        (b"", b"", b""),  # nobody has asked for anything
    ],
    ids=["body", "head", "the next head", "nothing"],
)
def test_whoever_sends_slowly_is_let_go(
    first: bytes, then: bytes, told: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then ends in a 408; others are answered meanwhile, and those who have sent a head may wait."""
    monkeypatch.setattr(frame, "PATIENCE", 1.0)
    monkeypatch.setattr(server, "log_to", lambda _: None)

    def look(url: str) -> None:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
            slow.sendall(first)
            began = time.monotonic()
            slow.settimeout(0.1)
            answer, ended = b"", False
            while not ended and time.monotonic() < began + 60:
                with contextlib.suppress(TimeoutError):
                    try:
                        got = slow.recv(4096)
                        answer, ended = answer + got, not got
                        slow.sendall(then)
                    except ConnectionError:
                        ended = True
            assert ended and answer.startswith(told) and time.monotonic() >= began + 0.9
            if then:
                assert b"HTTP/1.1 408" in answer and b'"request_timeout"' in answer and answer.endswith(b"}")
            else:
                assert answer == b""
        assert httpx2.get(f"{url}/health").status_code == 200
        if not then:
            began = time.monotonic()
            made = httpx2.post(f"{url}/v1/chat/completions", json={"model": "scripted", "messages": HI}, timeout=60)
            assert made.status_code == 200 and time.monotonic() > began + 1

    looked(state_of(scripted("word " * 5, pause=0.3)), Place(port=0), look)


@pytest.mark.parametrize(
    "sent", [b"no HTTP\r\n\r\n", BEGUN + b"X-Long: " + b"x" * 20_000], ids=["garbage", "a long head"]
)
def test_what_is_no_request_is_told_in_the_one_shape(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "log_to", lambda _: None)

    def look(url: str) -> None:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=60) as raw:
            raw.sendall(sent)
            answer = b""
            with contextlib.suppress(ConnectionError):
                while got := raw.recv(4096):
                    answer += got
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400") and b"connection: close" in head.lower()
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

    looked(state_of(scripted()), Place(port=0), look)


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
    monkeypatch.setattr(server, "log_to", lambda _: None)
    engine = scripted()

    async def start() -> None:
        raise ModelError("can't be read", where="model.gguf", fix="Check the file.")

    engine.start = start  # type: ignore[method-assign]
    with pytest.raises(ModelError, match="can't be read"):
        server.serve(state_of(engine), Place(port=0))
    assert "Traceback" not in capfd.readouterr().err


def test_an_address_or_certificate_that_can_not_be_had_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no certificate")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        wrong = {
            "another process listens there already": Place(port=taken.getsockname()[1]),
            "can't be listened at": Place("203.0.113.7"),
            "can't be used as a certificate": Place("127.0.0.1", 0, tmp_path / "no.pem", tmp_path / "no.pem"),
            "is not there": Place("127.0.0.1", 0, tmp_path / "none.pem"),
        }
        for why, place in wrong.items():
            engine = scripted()
            with pytest.raises(RunError, match=why) as told:
                server.serve(state_of(engine, keys=["sk-test"]), place)
            assert told.value.fix and engine.state == "starting"


def test_a_server_says_where_it_listens_once_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "log_to", lambda _: None)
    said: list[str] = []

    def ready(url: str) -> None:
        said.append(url)
        signal.raise_signal(signal.SIGTERM)

    engine = scripted()
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        server.serve(state_of(engine), Place("localhost", 0), ready=ready)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert said[0].startswith("http://localhost:") and int(said[0].rpartition(":")[2]) > 0
    assert engine.state == "failed"


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
