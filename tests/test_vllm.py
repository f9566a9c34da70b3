"""The vLLM engine against a server that speaks vLLM's protocol (vLLM itself needs a GPU)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving import Served, build
from tunesmith.errors import MachineError, ModelError
from tunesmith.inference.engines import Auto, Vllm
from tunesmith.inference.served import EngineDown, EngineError, Request

pytest.importorskip("aiohttp")
pytest.importorskip("llguidance")
FAKE = (sys.executable, str(Path(__file__).parent / "fake_vllm.py"))


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Served]:
    runner = asyncio.Runner()
    engine = build(Vllm(command=FAKE, slots=2, context=256, arguments=("--dtype", "float32")), tiny_model)
    runner.run(engine.start())
    yield Served(runner, engine, tiny_model, {}, {})
    runner.run(engine.close())
    runner.close()


def told(served: Served) -> dict[str, Any]:
    async def asked() -> dict[str, Any]:
        async with served.engine._child.session.get("/told") as response:
            found: dict[str, Any] = await response.json()
            return found

    found: dict[str, Any] = served.run(asked())
    return found


def test_it_is_started_as_told_and_asked_with_ids(served: Served) -> None:
    request = Request(
        [7, 20], 4, (23,), seed=3, top_p=0.5, temperature=0.7, logit_bias={5: 1.5}, stop=("x",), top_logprobs=1,
        grammar={"type": "object"},
    )  # fmt: skip
    pieces = served.run(served.pieces(request))
    assert "".join(p.text for p in pieces) == "<21><22>" and [i for p in pieces for i in p.ids] == [21, 22]
    assert (pieces[-1].finish, pieces[-1].cached) == ("stop", 3)
    first = pieces[0].logprobs[0]
    assert (first.id, first.logprob, len(first.top)) == (21, -0.5, 1) and first.data
    found = told(served)
    arguments = " ".join(found["arguments"])
    assert f"{served.model} --served-model-name base --max-model-len 256 --max-num-seqs 2 --enable-lora" in arguments
    assert "--dtype float32" in arguments
    body = found["seen"][-1]
    assert body["prompt"] == [7, 20] and body["stop_token_ids"] == [23] and body["logit_bias"] == {"5": 1.5}
    assert body["structured_outputs"] == {"json": {"type": "object"}} and body["seed"] == 3
    assert served.run(served.pieces(Request([7, 20], 4)))[-1].finish == "length"


def test_adapters_are_loaded_through_its_api(served: Served, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    async def through() -> None:
        running = asyncio.create_task(served.ids(Request([20], 60)))
        await served.engine.load_adapter("first", tmp_path)
        assert await served.ids(Request([20], 2, adapter="first")) == [31, 42]
        assert len(await running) == 60
        with pytest.raises(ModelError, match="No adapter found"):
            await served.engine.load_adapter("second", tmp_path / "nowhere")
        await served.engine.unload_adapter("first")
        assert served.engine.adapters() == []

    served.run(through())


def test_a_cancelled_stream_is_closed_and_a_refusal_is_told(served: Served) -> None:
    async def through() -> None:
        stream = served.engine.stream(Request([20], 250))
        await anext(stream)
        await stream.aclose()
        with pytest.raises(EngineError, match="Sixty-six is refused"):
            await served.ids(Request([66], 2))
        await asyncio.sleep(0.1)

    served.run(through())
    assert told(served)["streams"] == 0


def test_a_server_that_ends_is_started_again_with_its_adapters(served: Served, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    served.run(served.engine.load_adapter("first", tmp_path))
    pid = told(served)["pid"]

    async def through() -> None:
        stream = served.engine.stream(Request([20], 250))
        await anext(stream)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDown):
            async for _ in stream:
                pass
        until = time.monotonic() + 60
        while served.engine.health() == "ready" and time.monotonic() < until:
            await asyncio.sleep(0.02)
        while served.engine.health() != "ready" and time.monotonic() < until:
            await asyncio.sleep(0.05)
        assert await served.ids(Request([20], 2, adapter="first")) == [31, 42]

    served.run(through())
    assert told(served)["pid"] != pid


def test_an_adapter_that_is_gone_leaves_no_server_behind(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")

    def servers() -> set[int]:
        found = set()
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if FAKE[1] in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                    found.add(process.pid)
        return found

    async def through() -> None:
        before = servers()
        engine = build(Vllm(command=FAKE, context=256), tiny_model)
        await engine.start()
        for name in ("first", "second"):
            await engine.load_adapter(name, tmp_path / name)
        (tmp_path / "first" / "adapter_config.json").unlink()
        (pid,) = servers() - before
        os.kill(pid, signal.SIGKILL)
        until = time.monotonic() + 90
        while (engine.adapters() != ["second"] or engine.health() != "ready") and time.monotonic() < until:
            await asyncio.sleep(0.05)
        assert [i async for p in engine.stream(Request([20], 2, adapter="second")) for i in p.ids] == [31, 42]
        assert len(servers() - before) == 1
        await engine.close()
        assert servers() == before

    asyncio.run(through())


def test_what_vllm_takes_otherwise_is_told_otherwise(served: Served, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")

    async def through() -> None:
        await served.engine.load_adapter("base", tmp_path)
        assert await served.ids(Request([20], 2, top_p=0.0, seed=-1)) == [21, 22]
        assert await served.ids(Request([20], 2, adapter="base")) == [31, 42]
        await served.engine.unload_adapter("base")

    served.run(through())
    bodies = told(served)["seen"][-2:]
    assert 0 < bodies[0]["top_p"] < 1e-3 and bodies[0]["seed"] >= 0


def test_it_ends_with_the_engine_and_errors_are_told(tiny_model: Path) -> None:
    async def through() -> None:
        engine = build(Vllm(command=FAKE, context=256), tiny_model)
        await engine.start()
        async with engine._child.session.get("/told") as response:
            pid = json.loads(await response.text())["pid"]
        elsewhere = build(Vllm(url=engine._child.ready["url"], model="base", context=256), tiny_model)
        await elsewhere.start()
        assert [i async for p in elsewhere.stream(Request([20], 2)) for i in p.ids] == [21, 22]
        await elsewhere.close()
        await engine.close()
        assert not psutil.pid_exists(pid)
        with pytest.raises(ModelError, match="ended while it loaded"):
            await build(Vllm(command=FAKE, arguments=("--broken",)), tiny_model).start()
        with pytest.raises(MachineError, match="no program 'no-such-vllm'"):
            await build(Vllm(command=("no-such-vllm", "serve")), tiny_model).start()

    asyncio.run(through())


def test_auto_chooses_by_its_rules(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import make_model
    from tunesmith.inference import engines
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    def kind(path: Path) -> str:
        return Auto(slots=3).chosen(resolve(ModelSection(name=str(path))))[0].kind

    installed = {"xllamacpp"}
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(engines, "_cuda", lambda: False)
    assert kind(tiny_model) == "llamacpp"
    assert kind(make_model(tmp_path / "gpt2", architecture="gpt2")) == "transformers"
    installed.clear()
    assert kind(tiny_model) == "transformers"
    monkeypatch.setattr(engines, "_cuda", lambda: True)
    assert kind(tiny_model) == "transformers"
    installed.add("vllm")
    assert kind(tiny_model) == "vllm"
