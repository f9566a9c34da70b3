"""`tunesmith serve` from a shell: a run, a folder and an adapter, on a real engine; gates, signals, crashes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.conftest import write_recipe

ENGINE = "engine=transformers"


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@contextlib.contextmanager
def served(*words: object, cwd: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in a process of its own, once it is ready."""
    port = free_port()
    command = [sys.executable, "-m", "tunesmith", "serve", *map(str, words), "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    log = (cwd / "serve.log").open("w")
    process = subprocess.Popen(command, cwd=cwd, stderr=log, stdout=log, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 300
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{url}/ready").status_code == 200:
                    break
            time.sleep(0.2)
        assert process.poll() is None, (cwd / "serve.log").read_text()
        yield url, process
    finally:
        process.terminate()
        process.wait(120)
        log.close()


@pytest.fixture
def run(recipe: dict[str, Any], tmp_path: Path, tunesmith: Any) -> Path:
    """A trained run."""
    assert (
        tunesmith("train", write_recipe(tmp_path, recipe | {"data": recipe["data"] | {"system": "Say a colour."}})).code
        == 0
    )
    return tmp_path / "runs/tiny"


def test_a_run_answers_as_chat_does_and_its_base_beside_it(run: Path, tmp_path: Path, tunesmith: Any) -> None:
    text = "Item 3 is black. What colour is it?"
    chat = tunesmith("chat", "tiny", "--say", text, "--max-new-tokens", "8", "--base", "--json").json
    words = [
        "tiny",
        "--adapter",
        f"again={run / 'train/adapter'}",
        "--set",
        ENGINE,
        "--set",
        "engine.precision=float32",
    ]
    with served(*words, "--database", "sqlite:///traffic.db", "--key", "sk-test", cwd=tmp_path) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0)
        names = {m.id for m in client.models.list()}
        assert names == {"tiny", "tiny-llama", "again"}

        def answer(model: str, **more: Any) -> str | None:
            messages: Any = [{"role": "user", "content": text}]
            done = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=8, **more)
            return done.choices[0].message.content

        assert answer("tiny") == chat["tuned"]
        base: Any = [{"role": "system", "content": "Say a colour."}, {"role": "user", "content": text}]
        said = client.chat.completions.create(model="tiny-llama", messages=base, temperature=0, max_tokens=8)
        assert said.choices[0].message.content == chat["base"]
        schema: dict[str, Any] = {"type": "object", "properties": {"c": {"enum": ["red", "blue"]}}, "required": ["c"]}
        schema["additionalProperties"] = False
        for stream in (False, True):
            form: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": True}}
            made = httpx2.post(
                f"{url}/v1/chat/completions",
                json={"model": "tiny", "messages": base, "response_format": form, "stream": stream, "max_tokens": 60},
                headers={"authorization": "Bearer sk-test"},
                timeout=120,
            ).text
            if not stream:
                content = json.loads(made)["choices"][0]["message"]["content"]
            else:
                lines = [json.loads(x[6:]) for x in made.splitlines() if x.startswith("data: {")]
                content = "".join(x["choices"][0]["delta"].get("content") or "" for x in lines)
            assert json.loads(content)["c"] in ("red", "blue")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="sk-no", max_retries=0).models.list()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    from tunesmith import store

    kept = list(store.open(f"sqlite:///{tmp_path}/traffic.db").traffic.export())
    assert len(kept) == 4 and {t.model for t in kept} == {"tiny", "tiny-llama"}
    log = (tmp_path / "serve.log").read_text()
    assert "Traceback" not in log and '"path": "/v1/chat/completions"' in log and "What colour" not in log


def test_what_the_gate_holds_is_refused_unless_forced(
    recipe: dict[str, Any], tmp_path: Path, tunesmith: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tunesmith("run", write_recipe(tmp_path, recipe | {"gate": ["accuracy.low > 1"]})).code == 3
    held = tunesmith("serve", "tiny")
    assert held.code == 3 and "held by the gate" in held.err and "--force" in held.err
    held = tunesmith("promote", "support", "tiny")
    assert held.code == 3 and not (tmp_path / "runs/routes.yaml").exists()
    assert tunesmith("promote", "support", "tiny", "--force").code == 0
    assert "held by the gate" in (tmp_path / "runs/routes.yaml").read_text()
    from tunesmith.api import launch

    monkeypatch.setattr(launch, "serve", lambda *_, **__: None)
    assert tunesmith("serve", "tiny", "--force", "--set", ENGINE).code == 0
    assert "served_though_held" in (tmp_path / "runs/tiny/events.jsonl").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "no model 'nowhere'"),
        (["{tiny}", "--host", "0.0.0.0"], "nobody would need a key"),
        (["{tiny}", "--tls-cert", "none.pem", "--tls-key", "none.pem"], "is not there"),
        (["{tiny}", "--adapter", "mine"], "names no adapter"),
        (["{tiny}", "--adapter", "mine=none"], "holds no adapter"),
        (["{tiny}", "--set", "dedline=5"], "did you mean 'deadline'"),
        (["{tiny}", "a={tiny}", "--set", "engine=nothing"], "engine"),
    ],
)
def test_what_serve_refuses(words: list[str], says: str, tiny_model: Path, tunesmith: Any) -> None:
    said = tunesmith("serve", *(w.replace("{tiny}", str(tiny_model)) for w in words))
    assert said.code == 2 and says in said.err and "Traceback" not in said.err


@pytest.mark.proof
def test_killed_in_the_middle_of_a_stream(tiny_model: Path, tmp_path: Path) -> None:
    """kill -9 of the engine: a 503 that says when to come again, and then answers. kill -9 of the server: the stream
    breaks off, no engine is left behind, and the same command answers again and has kept what was answered before."""
    import psutil

    from tunesmith import store

    def kept() -> set[str]:
        opened = store.open(f"sqlite:///{tmp_path}/traffic.db")
        found = {t.id for t in opened.traffic.export()}
        opened.close()
        return found

    words: tuple[object, ...] = (tiny_model, "--set", ENGINE, "--key", "sk-test", "--database", "sqlite:///traffic.db")
    headers = {"authorization": "Bearer sk-test"}
    bias = dict.fromkeys(map(str, (0, 1, 2)), -100)  # which would end it
    body = {"model": "tiny-llama", "messages": [{"role": "user", "content": "Hi"}], "logit_bias": bias}
    answered = []
    for stop in ("kill", "terminate"):
        with served(*words, cwd=tmp_path) as (url, process):
            ask = {"url": f"{url}/v1/chat/completions", "headers": headers, "timeout": 120}
            answered.append(httpx2.post(json=body | {"max_tokens": 4}, **ask).json()["id"])
            end = time.monotonic() + 60
            while answered[-1] not in kept() and time.monotonic() < end:
                time.sleep(0.2)  # it is written behind the answer's back
            if stop == "kill":
                for engine in psutil.Process(process.pid).children(recursive=True):
                    engine.kill()
                while (again := httpx2.post(json=body | {"max_tokens": 4}, **ask)).status_code != 200:
                    assert again.status_code == 503 and int(again.headers["retry-after"]) >= 1
                    assert time.monotonic() < end + 180
                    time.sleep(0.2)
                assert process.poll() is None
            engines = psutil.Process(process.pid).children(recursive=True)
            assert engines
            with httpx2.stream("POST", json=body | {"stream": True, "max_tokens": 400}, **ask) as response:
                lines = response.iter_lines()
                first = json.loads(next(lines).removeprefix("data: "))
                getattr(process, stop)()
                if stop == "kill":
                    with pytest.raises(httpx2.TransportError):
                        list(lines)
                else:
                    assert [line for line in lines if line][-1] == "data: [DONE]"
                    answered.append(first["id"])
            assert process.wait(120) == (-signal.SIGKILL if stop == "kill" else 0)
            end = time.monotonic() + 60
            while any(map(_alive, engines)) and time.monotonic() < end:
                time.sleep(0.05)
            assert not any(map(_alive, engines))
    assert len(answered) == 3 and set(answered) <= kept()


def _alive(process: Any) -> bool:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False
