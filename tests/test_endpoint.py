"""Endpoints as others have them: down, with another name, with settings that they refuse, failing now and then."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import colour_rows, write_jsonl
from tests.fake_endpoint import FakeEndpoint
from tests.listening import Listening, Quiet
from tests.test_report import Page
from tunesmith.inference import endpoint


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (0.01,) * 4)


def colour_of(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"].split(".")[0].split()[-1]


@pytest.fixture
def compare(tunesmith: Any, tmp_path: Path) -> Any:
    """Two endpoints on colours, by `tunesmith evaluate`."""
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(20))

    def call(model: str, against: str, *sets: str) -> Any:
        told = [part for s in ("evaluate.max_new_tokens=3", *sets) for part in ("--set", s)]
        return tunesmith("evaluate", "--model", model, "--against", against, "--data", data, "--json", *told)

    return call


def closed() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


def test_one_that_is_down_is_an_error_and_no_result(compare: Any, tmp_path: Path) -> None:
    with FakeEndpoint(colour_of) as there:
        said = compare(f"{closed()}#big", f"{there.url}#small")
        assert said.code == 2 and "answers nothing: ConnectError" in said.json["error"]["what"], said.out
        assert not (tmp_path / "evaluation/scorecard.json").exists()
        asked = len(there.asked)
        assert compare(f"{there.url}#big", f"{there.url}#small").code == 0
        assert len(there.asked) == asked + 20  # the baseline's answers were kept


def test_a_model_that_is_not_there_is_an_error(compare: Any) -> None:
    def slowly(messages: list[dict[str, str]], number: int) -> int:
        time.sleep(0.1)  # so that those who ask don't run ahead of who reads what came of it
        return 404

    with FakeEndpoint(colour_of, slowly) as there:
        said = compare(f"{there.url}#nobody", f"{there.url}#small")
    assert said.code == 2 and "status 404" in said.json["error"]["what"]
    assert len(there.asked) < 20  # it was not asked all of it


def test_a_judge_that_is_down_is_an_error_and_costs_no_answers(compare: Any) -> None:
    with FakeEndpoint(colour_of) as there, FakeEndpoint(lambda m: "red") as other:
        models = f"{there.url}#good", f"{other.url}#bad"
        said = compare(*models, f"evaluate.judge={closed()}#judge")
        assert said.code == 2 and "answers nothing" in said.json["error"]["what"]
        assert "judge" in said.json["error"]["where"]
        with FakeEndpoint(lambda m: '{"verdict": "tie"}') as judge:
            asked = len(there.asked)
            said = compare(*models, f"evaluate.judge={judge.url}#judge")
        assert said.code == 0 and len(there.asked) == asked
        assert said.json["judge"]["preference"]["value"] == 0.5


def test_settings_that_a_model_refuses_are_left_out(compare: Any, capsys: Any) -> None:
    def refuse(body: dict[str, Any]) -> str | None:
        if "max_tokens" in body:
            return "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        if "temperature" in body:
            return "Unsupported value: 'temperature' does not support 0 with this model."
        return None

    with FakeEndpoint(colour_of, refuse=refuse) as there:
        said = compare(f"{there.url}#thinker", f"{there.url}#thinker")
    assert said.code == 0 and said.json["metrics"]["accuracy"]["tuned"]["value"] == 1.0, said.out
    last = there.asked[-1]
    assert last["max_completion_tokens"] == 3 and not {"max_tokens", "temperature"} & set(last)


def test_other_errors_of_a_request_are_failures(compare: Any) -> None:
    def refuse(body: dict[str, Any]) -> str | None:
        long = "Item 2 " in body["messages"][-1]["content"]
        return "the context is too long: reduce max_tokens" if long else None

    with FakeEndpoint(colour_of, refuse=refuse) as there:
        said = compare(f"{there.url}#a", f"{there.url}#a")
    assert said.json["metrics"]["accuracy"]["tuned"]["value"] == 19 / 20
    (why,) = said.json["failures"]["tuned"]
    assert "the context is too long" in why


def test_what_fails_in_a_probe_is_counted_and_never_in_a_models_favour(compare: Any) -> None:
    def fail(messages: list[dict[str, str]], number: int) -> int | None:
        return 500 if "Item" not in messages[-1]["content"] else None  # all that is not a test row

    with FakeEndpoint(colour_of, fail) as there, FakeEndpoint(lambda m: "I can't help with that.") as firm:
        said = compare(f"{there.url}#a", f"{firm.url}#b", "evaluate.safety={prompts: 2, attacked: 1}")
    assert said.code == 0, said.out
    card = said.json
    assert card["safety"]["refusal"]["baseline"]["value"] == 1 and card["safety"]["refusal"]["tuned"]["value"] == 0
    assert card["safety"]["over_refusal"]["tuned"]["value"] == 1 and card["safety"]["defence"]["tuned"]["value"] == 0
    assert card["failures"]["tuned"] == {"status 500 (5 times)": 2 + 2 + 6} and not card["failures"]["baseline"]


def test_a_kill_loses_what_was_under_way_and_nothing_else(compare: Any, tmp_path: Path) -> None:
    """The command's own process, killed while the endpoint keeps eight of its questions waiting."""
    waiting, go = threading.Semaphore(0), threading.Event()

    def reply(messages: list[dict[str, str]]) -> str:
        if len(there.asked) > 10 and not go.is_set():
            waiting.release()
            go.wait(60)
        return colour_of(messages)

    with FakeEndpoint(reply) as there, FakeEndpoint(lambda m: "red") as other:
        models = f"{there.url}#a", f"{other.url}#b"
        words = ["evaluate", "--model", models[1], "--against", models[0], "--data", "test.jsonl"]
        command = [sys.executable, "-m", "tunesmith", *words, "--set", "evaluate.max_new_tokens=3"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        assert waiting.acquire(timeout=120)
        answers, end = tmp_path / "evaluation/answers", time.monotonic() + 20
        while sum(len(p.read_text().splitlines()) for p in answers.glob("*.jsonl")) < 10 and time.monotonic() < end:
            time.sleep(0.05)
        process.kill()
        process.wait()
        go.set()
        kept = sum(len(p.read_text().splitlines()) for p in answers.glob("*.jsonl"))
        asked = len(there.asked)
        assert kept == 10 and asked <= kept + endpoint.AT_ONCE
        said = compare(models[1], models[0])
        assert said.code == 0 and said.json["metrics"]["accuracy"]["baseline"]["value"] == 1.0, said.out
        assert len(there.asked) == asked + 20 - kept


def test_the_report_of_two_endpoints_says_what_they_were(compare: Any, tunesmith: Any, tmp_path: Path) -> None:
    with FakeEndpoint(colour_of) as there, FakeEndpoint(lambda m: "<b>red</b>") as other:
        assert compare(f"{there.url}#good", f"{other.url}#bad").code == 0
    manifest = json.loads((tmp_path / "evaluation/evaluate/manifest.json").read_text())
    assert manifest["models"]["tuned"] == {"source": "endpoint", "name": f"{there.url}#good"}
    assert set(manifest["inputs"]) == {"test.jsonl"} and manifest["machine"] is None
    shown = Page(tmp_path / "evaluation/report.html")  # well formed, or this fails
    assert "good (called tuned here) against bad (baseline)" in shown.text
    assert manifest["key"] in shown.text and manifest["inputs"]["test.jsonl"][:12] in shown.text
    assert f"{other.url}#bad" in shown.text and "<b>red</b>" in shown.text
    assert "Training" not in shown.text and not any(a.get("href") == "#data" for _, a in shown.elements)
    table = (tmp_path / "evaluation/report.html").read_text().split('<table id="every">')[1].split("</table>")[0]
    assert table.count("<tr>") == 21
    assert tunesmith("golden", "evaluation", "test.jsonl:3").code == 0  # a case from this report
    assert "test.jsonl:3" in (tmp_path / "suite.yaml").read_text()


@pytest.fixture
def says() -> Any:
    """Endpoints that answer everything with the same bytes."""
    opened: list[Listening] = []

    def start(body: bytes, **headers: str) -> str:
        class Handler(Quiet):
            def do_POST(self) -> None:
                self.read()
                self.send(body, **headers)

        opened.append(Listening(Handler))
        return f"{opened[-1].url}/v1#odd"

    yield start
    for server in opened:
        server.close()


def completion(message: Any, usage: Any = None) -> bytes:
    return json.dumps({"choices": [{"message": message}], "usage": usage}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"<html>", b"", b"[]", b"5", b"\xff\xfe", b"[" * 20_000, b'{"choices": []}', completion("hi"), completion(None),
        completion({"content": 5}), completion({"content": {"a": 1}}), completion({"content": [1]}),
        completion({"tool_calls": [1]}), completion({"content": "red"}, [1]),
        completion({"content": "red"}, {"prompt_tokens": "x"}),
        completion({"content": "red"}, {"prompt_tokens": 1e400}),
    ],
)  # fmt: skip
def test_what_is_no_chat_completion_is_one_error_and_nothing_is_kept_of_it(
    body: bytes, says: Any, compare: Any, tmp_path: Path
) -> None:
    with FakeEndpoint(colour_of) as there:
        said = compare(says(body), f"{there.url}#good")
    assert said.code == 2, said.out
    assert "answers nothing: an answer that is not a chat completion" in said.json["error"]["what"]
    kept = [
        line for path in (tmp_path / "evaluation/answers").glob("*.jsonl") for line in path.read_text().splitlines()
    ]
    assert len(kept) == 20  # the other one's


def test_answers_in_parts_or_cut_in_the_middle_of_a_character_are_read(says: Any, compare: Any) -> None:
    parts = says(completion({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "red"}]}))
    half = says(b'{"choices": [{"message": {"content": "red\\ud83d"}}]}')
    said = compare(parts, half)
    assert said.code == 0, said.out
    assert said.json["metrics"]["accuracy"]["tuned"]["value"] == 0.25
    assert said.json["metrics"]["accuracy"]["baseline"]["value"] == 0


@pytest.mark.parametrize("address", ["http://[bad/v1#m", "http://host:99999/v1#m", "http://host:x/v1#m", "http://#m"])
def test_addresses_that_are_none(address: str, compare: Any, says: Any) -> None:
    said = compare(address, says(completion({"content": "red"})))
    assert said.code == 2 and "Write it as https://host/v1#model-name." in said.json["error"]["fix"], said.out


def test_numbers_that_no_float_holds_are_wrong_answers(says: Any, compare: Any, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"a": {"multipleOf": 0.5}}}')
    long = says(completion({"content": '{"a": %s}' % ("1" * 400)}))
    metrics = "evaluate.metrics=[json_field_f1,numeric,tool_call,span_f1,schema_valid]"
    said = compare(long, says(completion({"content": '{"a": 1}'})), metrics, "evaluate.json_schema=schema.json")
    assert said.code == 0, said.out
    assert said.json["metrics"]["schema_valid"]["baseline"]["value"] == 1
    (tmp_path / "schema.json").write_text('{"$ref": "#/$defs/none"}')
    said = compare(long, long, metrics, "evaluate.json_schema=schema.json")
    assert said.code == 2 and "refers to what it does not hold" in said.json["error"]["what"]
