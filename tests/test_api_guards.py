"""Guards that judge whole texts: `toxicity` and guard models, what they let through and what not; through HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.scripted import HI, Scripted, ask, asked_text, figures, said, scripted, state_of, streamed
from tunesmith.api.app import build
from tunesmith.inference.served import EngineDown, Request

KIND = "The weather was pleasant and the garden looked green. "
FOUL = "You stupid fucking idiot. "


def guarded(engine: Scripted, **guard: Any) -> TestClient:
    return TestClient(build(state_of(engine, guards=[guard])))


@pytest.mark.parametrize("before", [0, 12])
def test_toxicity_refuses_what_is_asked(before: int) -> None:
    engine = scripted()
    with guarded(engine, kind="toxicity", on="input") as http:
        error = ask(http, KIND * before + FOUL + KIND * 3).json()["error"]
        assert (error["code"], error["param"]) == ("content_filter", "messages") and not engine.asked
        assert said(ask(http, KIND * before)) == "Blue it is."


def test_toxicity_takes_out_what_the_model_must_not_see() -> None:
    engine = scripted()
    with guarded(engine, kind="toxicity", on="input", action="redact") as http:
        done = ask(http, KIND + FOUL)
        assert said(done) == "Blue it is." and done.headers["x-tunesmith-guards"] == "toxicity"
    assert "[REMOVED]" in asked_text(engine) and "idiot" not in asked_text(engine)


@pytest.mark.parametrize("before", [0, 3, 14])
@pytest.mark.parametrize(
    ("action", "finish", "mark"), [("block", "content_filter", ""), ("redact", "stop", "[REMOVED]")]
)
def test_toxicity_ends_an_answer_or_takes_its_rest_out(before: int, action: str, finish: str, mark: str) -> None:
    engine = scripted(KIND * before + FOUL + KIND * 6, context=4096)
    with guarded(engine, kind="toxicity", on="output", action=action) as http:
        whole = ask(http).json()["choices"][0]
        for text, ended in (streamed(http), (whole["message"]["content"], whole["finish_reason"])):
            assert ended == finish and text.endswith(mark) and "idiot" not in text
            assert (KIND * before).startswith(text.removesuffix(mark))  # nothing but what stood before it
        hits = f'tunesmith_guard_hits_total{{action="{action}",guard="toxicity",side="output"}}'
        assert figures(http)[hits] == 2
    assert engine.running == 0


def test_a_flag_lets_a_stream_through_and_counts() -> None:
    text = KIND * 14 + FOUL
    with guarded(scripted(text, context=4096), kind="toxicity", on="output", action="flag") as http:
        assert streamed(http) == (text, "stop")
        assert figures(http)['tunesmith_guard_hits_total{action="flag",guard="toxicity",side="output"}'] == 1


def down(request: Request, token: int) -> None:
    raise EngineDown("the process has ended")


JUDGES = {
    "is down": lambda: scripted("safe", name="judge", fail=down),
    "says nothing": lambda: scripted("", name="judge"),
    "is not there": lambda: scripted("safe", name="other"),
    "takes too long": lambda: scripted("safe " * 20, name="judge", pause=0.2),
}


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("judge", [*JUDGES, "does not listen"])
def test_a_guard_model_that_can_not_answer_lets_nothing_through(judge: str, side: str) -> None:
    engine = scripted("The code word is swordfish. " * 30, context=4096)
    others = [JUDGES[judge]()] if judge in JUDGES else []
    name = "judge" if others else "http://127.0.0.1:9/v1#judge"
    guards = [{"kind": "model", "model": name, "on": side}]
    with TestClient(build(state_of(engine, *others, guards=guards, deadline=0.5))) as http:
        done = ask(http)
        assert done.status_code >= 400 and done.json()["error"]["message"] and "swordfish" not in done.text
        body = {"model": "scripted", "messages": HI, "stream": True}
        shown = http.post("/v1/chat/completions", json=body).text
        assert '"error"' in shown and "swordfish" not in shown and '"content":"T' not in shown
    assert engine.running == 0 and (side == "output" or not engine.asked)
