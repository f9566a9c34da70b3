"""`tunesmith serve` on real engines over HTTP: every kind of target, one answer by every way, one template."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.conftest import make_model, make_tokenizer, write_recipe
from tests.fake_hub import hub_of
from tests.scripted import HERMES, running
from tests.serving import BIAS, greedy, make_adapter
from tunesmith.api import launch, server
from tunesmith.api.app import State

pytest.importorskip("xllamacpp")
EXACT = ("--set", "engine.precision=float32", "--set", "engine.slots=2")
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Rome"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Say a colour, in naïve words."},
    {"role": "user", "content": "What colour is the sky in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "blue", "tool_call_id": "c1"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "user", "content": "And <|im_end|> now?"},
]
Serve = Callable[..., Any]


@pytest.fixture
def serve(tunesmith: Any, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """`tunesmith serve WORDS` in this process, its engines in theirs; gives what `work(url, state)` gives."""

    def call(*words: object, work: Callable[[str, State], Any]) -> Any:
        found: list[Any] = []

        def here(state: State, place: Any, **_: Any) -> None:
            with running(state) as url:
                found.append(work(url, state))

        monkeypatch.setattr(launch, "serve", here)
        said = tunesmith("serve", *words)
        assert said.code == 0, said.err
        return found[0]

    return call


def ask(url: str, model: str, messages: list[dict[str, Any]], **more: Any) -> Any:
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 12} | more
    response = httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def prompt_of(tokenizer: Any) -> list[int]:
    """The talk's token ids by transformers alone. What a user writes is no special token; ids of its pieces say so."""
    told: list[dict[str, Any]] = json.loads(json.dumps(TALK))
    told[2]["tool_calls"][0]["function"]["arguments"] = {"place": "Rome"}
    before, said = "And ", "<|im_end|>"
    told[-1]["content"] = before + "\0" + " now?"
    text = tokenizer.apply_chat_template(told, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    head, tail = text.split("\0")
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (head, tail)]
    plain = tokenizer(said, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [*ids[0], *plain, *ids[1]]


def test_every_kind_of_target_has_one_template_and_one_answer(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, a hub id, a GGUF file under a name, an adapter: as transformers' own template and model, and PEFT."""
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.models.gguf_file import write_model

    folder = make_model(tmp_path / "talker", template=HERMES)
    write_model(folder, tmp_path / "small.gguf", "float32")
    tuned = make_adapter(folder, tmp_path / "lora", 1)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = prompt_of(make_tokenizer(HERMES))
    expected = {"talker": greedy(plain, ids, count=12), "mine": greedy(tuned, ids, count=12)}
    assert expected["talker"] != expected["mine"] and all(expected.values())
    texts = {name: make_tokenizer(HERMES).decode(found) for name, found in expected.items()}
    bias = {str(id): -100 for id in BIAS}

    def work(url: str, state: State) -> dict[str, tuple[str, int, str]]:
        found = {}
        for name in sorted(m["id"] for m in httpx2.get(f"{url}/v1/models").json()["data"]):
            told = ask(url, name, TALK, tools=[TOOL], logit_bias=bias)
            engine = state.serving.models.get(name).engine  # type: ignore[union-attr]
            text = told["choices"][0]["message"]["content"]
            if name in ("twin", "mine"):
                assert engine is state.serving.models.get(names[0]).engine  # type: ignore[union-attr]
            found[name] = engine.kind, told["usage"]["prompt_tokens"], text
        return found

    with hub_of(monkeypatch, tmp_path, {"team/good": folder}):
        for kind, targets, names in (
            (
                "llamacpp",
                [folder, f"twin={folder}", f"small={tmp_path}/small.gguf"],
                ["talker", "twin", "small", "mine"],
            ),
            ("transformers", ["team/good"], ["team/good", "mine"]),
        ):
            adapter = ("--adapter", f"mine={tmp_path}/lora", "--set", f"engine={kind}", *EXACT)
            found = serve(*targets, *adapter, work=work)
            text = {name: texts["mine" if name == "mine" else "talker"] for name in names}
            assert found == {name: (kind, len(ids), text[name]) for name in sorted(names)}


def whole(text: str) -> str:
    """Without the half of a letter at which the longest answer may end: some show it, and some nothing."""
    return text.rstrip("\ufffd")


@pytest.mark.parametrize("dora", [False, True], ids=["plain LoRA", "by its package"])
def test_a_run_says_the_same_by_chat_evaluation_and_server(
    dora: bool, serve: Serve, tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["train"]["adapter"]["dora"] = dora
    recipe["data"]["system"] = "Say a colour."
    recipe["evaluate"] = {"max_new_tokens": 8}
    assert tunesmith("run", write_recipe(tmp_path, recipe)).code in (0, 3, 4)
    lines = [json.loads(x) for x in (tmp_path / "runs/tiny/evaluate/answers.jsonl").read_text().splitlines()]
    users = [next(m["content"] for m in line["prompt"] if m["role"] == "user") for line in lines]
    evaluated = [whole(line["tuned"]["answer"]) for line in lines]
    chat = tunesmith("chat", "tiny", "--say", users[0], "--max-new-tokens", "8", "--json").json
    assert whole(chat["tuned"]) == evaluated[0]

    def work(url: str, state: State) -> list[str]:
        said = [{"role": "user", "content": user} for user in users]
        assert len(state.serving.models.engines) == 1  # type: ignore[union-attr]
        assert whole(ask(url, "again", said[:1], max_tokens=8)["choices"][0]["message"]["content"]) == evaluated[0]
        return [whole(ask(url, "tiny", [one], max_tokens=8)["choices"][0]["message"]["content"]) for one in said]

    for kind in ("llamacpp", "transformers"):
        assert serve("tiny", "again=tiny", "--force", "--set", f"engine={kind}", *EXACT, work=work) == evaluated, kind


def test_pickled_adapters_are_refused(
    serve: Serve, tunesmith: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    make_adapter(tiny_model, tmp_path / "a", 1)
    (tmp_path / "a/adapter_model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, tmp_path / "a/adapter_model.bin")

    def work(url: str, state: State) -> None:
        body = {"lora_name": "a", "lora_path": str(tmp_path / "a"), "base_model_name": "tiny-llama"}
        refused = httpx2.post(f"{url}/v1/load_lora_adapter", json=body, timeout=120)
        assert refused.status_code == 400 and "pickle" in refused.json()["error"]["message"]
        assert ask(url, "tiny-llama", TALK[:2])["choices"]

    serve(tiny_model, "--set", "engine=llamacpp", *EXACT, work=work)
    monkeypatch.setattr(launch, "serve", server.serve)
    monkeypatch.setattr(server, "log_to", lambda _: None)
    words = (tiny_model, "--adapter", f"a={tmp_path}/a", "--set", "engine=llamacpp", *EXACT)
    said = tunesmith("serve", *words, "--port", "0")
    assert said.code == 2 and "only has pickle weights (adapter_model.bin)" in said.err


@pytest.mark.parametrize("kind", ["llamacpp", "transformers"])
def test_an_engine_that_dies_takes_nobody_else_with_it(
    kind: str, serve: Serve, tiny_model: Path, tmp_path: Path
) -> None:
    """Requests of another engine go on to their end; those of the dead one are told to come again; it comes back."""
    other = make_model(tmp_path / "other", hidden_size=16)
    endless = {str(id): -100 for id in (*BIAS, 0, 1, 2)}

    async def through(url: str, state: State) -> None:
        begun = asyncio.Event()
        asked = f"{url}/v1/chat/completions"

        def body(model: str, tokens: int, stream: bool = True) -> dict[str, Any]:
            told = {"model": model, "messages": TALK[1:2], "stream": stream}
            return told | {"logit_bias": endless, "max_tokens": tokens}

        async def stream(model: str, tokens: int) -> list[str]:
            lines = []
            async with http.stream("POST", asked, json=body(model, tokens)) as response:
                assert response.status_code == 200
                async for line in response.aiter_lines():
                    lines += [line] if line else []
                    if model == "tiny-llama" and len(lines) == 3:
                        begun.set()
            return lines

        async with httpx2.AsyncClient(timeout=120) as http:
            engine: Any = state.serving.models.get("tiny-llama").engine  # type: ignore[union-attr]
            theirs = asyncio.create_task(stream("other", 300))
            whole = asyncio.create_task(http.post(asked, json=body("tiny-llama", 400, stream=False)))
            mine = asyncio.create_task(stream("tiny-llama", 400))
            await begun.wait()
            os.kill(engine._child.process.pid, signal.SIGKILL)
            *_, last, end = await mine
            told = json.loads(last.removeprefix("data: "))["error"]
            assert end == "data: [DONE]" and told["code"] == "engine_unavailable" and "Try again" in told["message"]
            for refused in (await whole, await http.post(asked, json=body("tiny-llama", 2, stream=False))):
                back = refused.status_code == 200 and refused is not whole.result()  # so soon
                assert back or (refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1)
            lines = await theirs
            assert lines[-1] == "data: [DONE]" and '"length"' in lines[-2] and len(lines) > 200
            until = time.monotonic() + 120
            while engine.health() != "ready" and time.monotonic() < until:
                await asyncio.sleep(0.05)
            assert (await stream("tiny-llama", 5))[-1] == "data: [DONE]"
            metrics = (await http.get(f"{url}/metrics")).text
            assert 'tunesmith_engine_restarts{engine="tiny-llama"} 1.0' in metrics

    def work(url: str, state: State) -> None:
        asyncio.run(through(url, state))

    serve(tiny_model, other, "--set", f"engine={kind}", *EXACT, work=work)
