"""What one request, one answer or one adapter does to an engine, it does to nobody else."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.scripted import scripted, state_of
from tests.serving import BIAS, CONTEXT, ENDLESS, STOPS, build, make_adapter, prompts
from tests.test_continuous import finished, opened
from tunesmith.api.app import build as application
from tunesmith.errors import ModelError
from tunesmith.inference import child
from tunesmith.inference.engines import EngineSection, LlamaCpp, Transformers
from tunesmith.inference.served import EngineDown, EngineError, Request, UnknownAdapter
from tunesmith.models.arrays import scale_of
from tunesmith.serve.local import _key
from tunesmith.serve.models import Served

pytest.importorskip("aiohttp")
pytest.importorskip("llguidance")
FAR = 999_999_999  # no token


@asynccontextmanager
async def started(section: EngineSection, model: Path) -> AsyncIterator[Any]:
    engine = build(section, model)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def transformers(**settings: Any) -> Transformers:
    return Transformers(**{"slots": 2, "context": CONTEXT, "precision": "float32"} | settings)


async def ids(engine: Any, request: Request) -> list[int]:
    return [i async for piece in engine.stream(request) for i in piece.ids]


async def ready_again(engine: Any) -> None:
    until = time.monotonic() + 120
    while engine.health() == "ready" and time.monotonic() < until:
        await asyncio.sleep(0.02)
    while engine.health() != "ready" and time.monotonic() < until:
        await asyncio.sleep(0.05)
    assert engine.health() == "ready"


def test_a_request_that_can_not_be_answered_fails_alone(tiny_model: Path) -> None:
    engine, wire = opened(tiny_model)
    usual = Request(prompts()[0], 20, STOPS, logit_bias=BIAS)
    engine.ask(1, usual)
    expected = finished(engine, wire)[1]
    wire.pieces.clear()
    engine.ask(1, usual)
    engine.ask(2, Request(prompts()[1], 20, STOPS, logit_bias={FAR: 1.0}))
    engine.ask(3, Request([FAR], 20, STOPS))
    engine.ask(4, usual)
    assert finished(engine, wire) == {1: expected, 2: [], 3: [], 4: expected}
    told = {number: (text, finish) for number, text, _, _, finish, _ in wire.pieces if number in (2, 3)}
    assert all("IndexError" in text and finish == "failed" for text, finish in told.values())
    assert engine.rows._lengths == []


def test_the_coldest_temperatures_are_none(tiny_model: Path) -> None:
    engine, wire = opened(tiny_model)
    for number, temperature in enumerate((0.0, 1e-38, 1e-5)):
        engine.ask(number, Request(prompts()[0], 10, STOPS, logit_bias=BIAS, temperature=temperature, seed=1))
    found = finished(engine, wire)
    assert found[0] == found[1] == found[2] != []


def test_a_bias_for_no_token_is_refused() -> None:
    engine = scripted()
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "logit_bias": {str(FAR): 1}}
    with TestClient(application(state_of(engine))) as http:
        refused = http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["param"] == "logit_bias" and str(FAR) in refused.text
        assert not engine.asked
        assert http.post("/v1/chat/completions", json=body | {"logit_bias": {"5": 1}}).status_code == 200


def test_many_embeddings_and_a_failure_leave_an_engine_as_it_was(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "LINE", 2**13)

    async def through() -> None:
        async with started(transformers(), tiny_model) as engine:
            usual = Request(prompts()[0], 5, STOPS, logit_bias=BIAS)
            expected = await ids(engine, usual)
            found = await engine.embed([[7, 8, i + 3] for i in range(40)])
            assert len(found) == 40 and found[0] == (await engine.embed([[7, 8, 3]]))[0]
            with pytest.raises(EngineError, match="IndexError"):
                await ids(engine, Request([FAR], 5))
            assert engine.restarts == 0 and await ids(engine, usual) == expected

    asyncio.run(through())


def test_a_process_that_can_not_be_understood_is_started_again(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "LINE", 250)  # bytes: less than an embedding has

    async def through() -> None:
        async with started(transformers(), tiny_model) as engine:
            with pytest.raises(EngineDown):
                await engine.embed([[7, 8]])
            await ready_again(engine)
            assert engine.restarts == 1
            assert await ids(engine, Request(prompts()[0], 2, logit_bias=BIAS)) != []

    asyncio.run(through())


@pytest.mark.parametrize("kind", ["transformers", "llamacpp"])
def test_an_adapter_that_is_spoilt_stops_nobody_else(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    if kind == "llamacpp":
        pytest.importorskip("xllamacpp")
    section = transformers() if kind == "transformers" else LlamaCpp(slots=2, context=CONTEXT, threads=1)
    for number, name in enumerate(("first", "second")):
        make_adapter(tiny_model, tmp_path / name, number)

    async def through() -> None:
        async with started(section, tiny_model) as engine:
            expected = {}
            for name in ("first", "second"):
                await engine.load_adapter(name, tmp_path / name)
            for name in (None, "second"):
                expected[name] = await ids(engine, Request(prompts()[0], 12, STOPS, adapter=name, logit_bias=BIAS))
            (tmp_path / "first" / "adapter_model.safetensors").write_bytes(b"spoilt")
            os.kill(engine._child.process.pid, signal.SIGKILL)
            await ready_again(engine)
            until = time.monotonic() + 60
            while engine.adapters() != ["second"] and time.monotonic() < until:
                await asyncio.sleep(0.05)
            for name, answer in expected.items():
                assert await ids(engine, Request(prompts()[0], 12, STOPS, adapter=name, logit_bias=BIAS)) == answer
            with pytest.raises(UnknownAdapter):
                await ids(engine, Request(prompts()[0], 12, STOPS, adapter="first"))

    asyncio.run(through())


def test_an_adapter_whose_folder_is_gone_stops_no_other_from_loading(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    for number, name in enumerate(("first", "second")):
        make_adapter(tiny_model, tmp_path / name, number)

    async def through() -> None:
        async with started(LlamaCpp(slots=2, context=CONTEXT, threads=1), tiny_model) as engine:
            await engine.load_adapter("first", tmp_path / "first")
            shutil.rmtree(tmp_path / "first")
            await engine.load_adapter("second", tmp_path / "second")
            assert engine.adapters() == ["second"]
            assert await ids(engine, Request(prompts()[0], 4, STOPS, adapter="second", logit_bias=ENDLESS))

    asyncio.run(through())


def test_an_adapter_without_matrices_is_refused_and_the_next_one_loads(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    engine, _ = opened(tiny_model)
    for name in ("empty", "good"):
        make_adapter(tiny_model, tmp_path / name, 1)
    save_file({}, tmp_path / "empty" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="holds no matrices"):
        engine.load("empty", tmp_path / "empty")
    engine.load("good", tmp_path / "good")
    assert engine.loras.names == ["good"]


def _config(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)


def _weights(folder: Path, data: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(data)


def _not_finite(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    held = load_file(folder / "adapter_model.safetensors")
    held[min(held)].flat[0] = float("nan")
    save_file(held, folder / "adapter_model.safetensors")


HEADER = b'{"base_model.model.x.lora_A.weight": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 4]}}'
SPOILT = {
    "no JSON": lambda f: _config(f, "{x"),
    "a list": lambda f: _config(f, "[]"),
    "no alpha": lambda f: _config(f, '{"peft_type": "LORA", "lora_alpha": "much"}'),
    "an odd pattern": lambda f: _config(f, '{"peft_type": "LORA", "lora_alpha": 1, "alpha_pattern": {"(": 2}}'),
    "another kind": lambda f: _config(f, '{"peft_type": "WHAT"}'),
    "no bytes": lambda f: _weights(f, b""),
    "other bytes": lambda f: _weights(f, b"\xff" * 4000),
    "no header": lambda f: _weights(f, (2).to_bytes(8, "little") + b"[]"),
    "an empty weight": lambda f: _weights(f, (10).to_bytes(8, "little") + b'{"x": {} }'),
    "a wrong size": lambda f: _weights(f, len(HEADER).to_bytes(8, "little") + HEADER + b"1234"),
    "not finite": _not_finite,
    "half a mark": lambda f: (f / "base.json").write_text("{}"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_adapter_is_one_sentence(tiny_model: Path, tmp_path: Path, how: str) -> None:
    from tunesmith.models.gguf_file import adapter_gguf
    from tunesmith.models.load import refuse_anothers
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    engine, _ = opened(tiny_model)
    make_adapter(tiny_model, tmp_path / "a", 1)
    SPOILT[how](tmp_path / "a")
    refuse_anothers(resolve(ModelSection(name=str(tiny_model))), tmp_path / "a")
    if how == "half a mark":  # says of no base that it was made for it
        engine.load("a", tmp_path / "a")
        return
    for load in (lambda: engine.load("a", tmp_path / "a"), lambda: adapter_gguf(tmp_path / "a", tiny_model)):
        with pytest.raises(ModelError) as told:
            load()
        assert len(told.value.what.splitlines()) == 1 and told.value.fix


def test_an_adapter_is_known_by_its_content_and_not_by_its_time(tiny_model: Path, tmp_path: Path) -> None:
    names = ("a", "same", "other")
    for name, seed in zip(names, (1, 1, 2), strict=True):
        make_adapter(tiny_model, tmp_path / name, seed)
    os.utime(tmp_path / "a" / "adapter_model.safetensors", (5, 5))

    async def through() -> dict[str, str]:
        engine = scripted()
        models = state_of(engine).serving.models  # type: ignore[union-attr]
        found = {name: (await models.add(name, "scripted", tmp_path / name)).identity for name in names}
        weights = tmp_path / "a" / "adapter_model.safetensors"
        weights.write_bytes((tmp_path / "other" / "adapter_model.safetensors").read_bytes())  # of one size
        os.utime(weights, (5, 5))
        await models.remove("a")
        return found | {"changed": (await models.add("a", "scripted", tmp_path / "a")).identity}

    found = asyncio.run(through())
    assert found["a"] == found["same"] and len({found["a"], found["other"]}) == 2
    assert found["changed"] == found["other"]


def test_scales_are_those_of_peft(tiny_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM

    patterns = {r"layers\.1\..*_proj": 3, "q_proj": 5, "self_attn.q_proj": 7, r".*\.up_proj": 11}
    make_adapter(tiny_model, tmp_path / "a", 1, alpha_pattern=patterns)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), tmp_path / "a")
    about = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    found = {
        name.removeprefix("base_model.model."): layer.scaling["default"]
        for name, layer in tuned.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert len(set(found.values())) == 4
    assert {name: scale_of(about, name, 4) for name in found} == found


def test_a_kept_answer_is_of_one_engine_and_precision() -> None:
    def key(**about: Any) -> str:
        engine = scripted()
        for name, value in about.items():
            setattr(engine, name, value)
        return _key(Served("a", engine, engine.renderer, identity="weights"), Request([5], 5), None)

    assert key() == key() and key(kind="vllm", precision="auto") == key(kind="vllm", precision="auto")
    told = [(kind, precision) for kind in ("llamacpp", "transformers") for precision in ("float32", "q8_0")]
    assert len({key(kind=kind, precision=precision) for kind, precision in told}) == 4


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_every_seed_is_one(tiny_model: Path, seed: int) -> None:
    pytest.importorskip("xllamacpp")

    async def through() -> None:
        section = LlamaCpp(slots=2, context=CONTEXT, threads=1, precision="float32")
        async with started(section, tiny_model) as engine:
            assert engine.precision == "float32"
            request = Request(prompts()[0], 16, (), temperature=2.0, seed=seed, logit_bias=ENDLESS)
            assert await ids(engine, request) == await ids(engine, request)

    asyncio.run(through())
