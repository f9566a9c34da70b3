"""What one request, one answer or one adapter does to an engine, it does to nobody else."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.scripted import scripted, state_of
from tests.serving import BIAS, CONTEXT, STOPS, build, prompts
from tests.test_continuous import finished, opened
from tunesmith.api.app import build as application
from tunesmith.inference import child
from tunesmith.inference.engines import EngineSection, Transformers
from tunesmith.inference.served import EngineDown, EngineError, Request

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
