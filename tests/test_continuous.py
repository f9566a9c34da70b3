"""Continuous batching in this process: every family answers as plain transformers does, whoever shares its batch."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_model
from tests.serving import BIAS, STOPS, greedy, prompts
from tunesmith.inference.served import Request
from tunesmith.models.resolve import resolve
from tunesmith.models.section import ModelSection

FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({}, "Rows"),
    "mistral": ({"sliding_window": 12}, "Rows"),
    "gemma3_text": ({"head_dim": 8, "sliding_window": 12}, "Rows"),
    "gpt2": ({}, "Rows"),
    "mamba": ({"state_size": 8}, "Apart"),
}


class Wire:
    """What the process would have told."""

    def __init__(self) -> None:
        self.pieces: list[list[Any]] = []

    def tell(self, **message: Any) -> None:
        self.pieces += message["pieces"]


def opened(folder: Path, **settings: Any) -> tuple[Any, Wire]:
    from tunesmith.inference import transformers_host

    model = asdict(resolve(ModelSection(name=str(folder))))
    wire = Wire()
    told = {"model": model, "precision": "float32", "slots": 4, "prefix_mb": 1, "adapters": {}} | settings
    return transformers_host.opened(told, wire), wire  # type: ignore[arg-type]


def finished(engine: Any, wire: Wire) -> dict[int, list[int]]:
    while engine.busy:
        engine.turn()
    found: dict[int, list[int]] = {}
    for number, _, ids, *_ in wire.pieces:
        found.setdefault(number, []).extend(ids)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_transformers_does(tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings, kind = FAMILIES[family]
    folder = make_model(tmp_path / family, architecture=family, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    engine, wire = opened(folder)
    assert type(engine.rows).__name__ == kind
    for number in range(3):  # the second and third join while the first is answered
        engine.ask(number, Request(prompts()[number], 24, STOPS, logit_bias=BIAS))
        engine.turn()
        engine.turn()
    assert finished(engine, wire) == {number: greedy(model, prompts()[number]) for number in range(3)}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompts_own_log_probabilities_are_the_models(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import math

    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.inference import rows

    monkeypatch.setattr(rows, "SCORED", 7)  # some places at a time
    folder = make_model(tmp_path / family, architecture=family, **FAMILIES[family][0])
    engine, wire = opened(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = prompts()[1]
    engine.ask(1, Request(prompts()[0], 20, STOPS, logit_bias=BIAS))
    engine.turn()
    told = engine.read_back(prompt, None, 3)  # while another is answered
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [token for token, *_ in told] == prompt
    assert math.isnan(told[0][2]) and told[0][3] == []
    for place, (token, letters, value, top) in enumerate(told[1:]):
        assert value == pytest.approx(expected[place, token].item(), abs=1e-4)
        assert [likely[2] for likely in top] == pytest.approx(expected[place].topk(3).values.tolist(), abs=1e-4)
        assert letters == engine._letters(token)
    assert finished(engine, wire)[1] == greedy(plain, prompts()[0], count=20)


def test_long_prompts_are_read_in_pieces_and_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.inference import continuous

    folder = make_model(tmp_path / "tiny")
    engine, wire = opened(folder, prefix_mb=0)
    long = (prompts()[1] * 9)[:400]
    engine.ask(1, Request(long, 10, STOPS, logit_bias=BIAS))
    whole = finished(engine, wire)[1]
    monkeypatch.setattr(continuous, "READ_TOKENS", 64)
    engine.ask(2, Request(prompts()[0], 30, (), logit_bias=BIAS | dict.fromkeys(STOPS, -1000.0)))
    engine.turn()
    engine.ask(3, Request(long, 10, STOPS, logit_bias=BIAS))
    before = sum(piece[0] == 2 for piece in wire.pieces)
    for _ in range(5):
        engine.turn()
    assert sum(piece[0] == 2 for piece in wire.pieces) == before + 5  # it went on meanwhile
    assert not any(piece[0] == 3 for piece in wire.pieces)
    assert finished(engine, wire)[3] == whole
    assert engine.rows._prefixes == [] and engine.rows._lengths == []


def test_what_is_cancelled_leaves_the_others_alone(tiny_model: Path) -> None:
    engine, wire = opened(tiny_model)
    alone = {}
    for number in range(3):
        engine.ask(number, Request(prompts()[number], 20, STOPS, logit_bias=BIAS))
    alone = finished(engine, wire)
    wire.pieces.clear()
    for number in range(5):
        engine.ask(number, Request(prompts()[number % 3], 20, STOPS, logit_bias=BIAS))
    engine.turn()
    engine.turn()
    engine.cancel(0)
    engine.turn()
    engine.cancel(3)
    engine.cancel(99)
    found = finished(engine, wire)
    assert {number: found[number] for number in (1, 2, 4)} == {1: alone[1], 2: alone[2], 4: alone[1]}
    assert len(found[0]) < len(alone[0]) and engine.rows._lengths == []


def test_few_sizes_come_and_change_no_answer(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in bfloat16 on processors that compile products for their shape, here in float32."""
    from tunesmith.inference import rows

    engine, wire = opened(tiny_model)
    for number in range(3):
        engine.ask(number, Request(prompts()[number], 20, STOPS, logit_bias=BIAS))
    plain = finished(engine, wire)
    monkeypatch.setattr(rows, "few_shapes", lambda device, dtype: True)
    engine, wire = opened(tiny_model)
    for number in range(6):
        engine.ask(number, Request(prompts()[number % 3], 20, STOPS, logit_bias=BIAS))
    assert finished(engine, wire) == {number: plain[number % 3] for number in range(6)}
    assert [held.keys.shape[0] for held in engine.rows._held] == [4, 4]
