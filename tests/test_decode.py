"""Our batched decoding gives token for token what transformers' own generation gives, one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model
from tunesmith.conversation.render import Rendered
from tunesmith.inference.transformers_engine import TransformersEngine
from tunesmith.models import packed
from tunesmith.models.machine import Machine
from tunesmith.models.resolve import resolve
from tunesmith.models.section import ModelSection
from tunesmith.models.shapes import rounded

HERE = Machine("any", 2, "cpu", "float32", {}, None)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "mistral, wider": {"sliding_window": 64},  # than any row: what all begin with lies apart
    "qwen3": {"head_dim": 8},
    "smollm3": {"no_rope_layer_interval": 2},
    "gemma": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "gpt2": {},
    "gpt_neox": {},
    "phi": {"qk_layernorm": True},
    "phi3": {"pad_token_id": 0},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mamba": {},  # has no attention: transformers' own generation answers
}
NOT_HERE = ("mamba",)


def engine(folder: Path) -> TransformersEngine:
    return TransformersEngine(resolve(ModelSection(name=str(folder))), HERE)


def prompts(shared: int) -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    beginning = torch.randint(3, 200, (shared,), generator=random).tolist()
    return [beginning + torch.randint(3, 200, (n,), generator=random).tolist() for n in (9, 1, 14, 5, 9, 11, 12)]


def alone(model: Any, ids: list[int], limit: int, stops: list[int]) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=stops,
        pad_token_id=0,
    )[0].tolist()[len(ids) :]
    return out[: next((i for i, token in enumerate(out) if token in stops), len(out))]


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(("shared", "few"), [(0, False), (12, False), (12, True)])
def test_answers_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, shared: int, few: bool
) -> None:
    monkeypatch.setattr(packed, "few_shapes", lambda *_: few)
    made = engine(make_model(tmp_path, architecture=architecture.split(",")[0], **FAMILIES[architecture]))
    given = prompts(shared)
    free = [alone(made.model, ids, 10, []) for ids in given]
    stops = sorted({free[0][4], free[2][7]})  # some end early, in the middle of the batch
    expected = [alone(made.model, ids, 10, stops) for ids in given]
    assert len({len(ids) for ids in expected}) > 1
    done: list[float] = []
    assert made.generate(given, 10, stops, done.append) == expected
    assert sum(done) == pytest.approx(len(given))
    assert (made._decoder is None) == (architecture in NOT_HERE)
    assert made.stream(given[0], 10, stops, lambda token: None) == expected[0]  # the model is as it was before


def test_small_batches_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(make_model(tmp_path))
    expected = made.generate(prompts(12), 10, [], lambda n: None)
    monkeypatch.setattr("tunesmith.inference.decode.BATCH_ROWS", 2)
    monkeypatch.setattr("tunesmith.inference.decode.READ_TOKENS", 1)
    assert made.generate(prompts(12), 10, [], lambda n: None) == expected
    assert made.generate([], 10, [], lambda n: None) == []


def test_what_all_prompts_begin_with_is_kept_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of a long common beginning: once for all rows, and not counted for each of them."""
    made = engine(make_model(tmp_path))
    made.generate(prompts(40), 1, [], lambda n: None)
    decoder = made._decoder
    assert decoder is not None
    with torch.inference_mode():
        _, past, _, _ = decoder._read(prompts(40), 4)
    for layer in past.layers:
        assert layer.begun[0].shape[1] == 40
        assert layer.keys.shape[2] < 40
    own = 14 + 4  # of the longest row
    monkeypatch.setattr("tunesmith.inference.decode.CACHE_BYTES", 7 * own * decoder.token_bytes)
    assert len(decoder.batches(prompts(40), 4)) == 1
    assert len(decoder.batches(prompts(40)[:1] * 2 + [[7] * 49], 4)) == 2  # begins otherwise: each with all its own


@pytest.mark.parametrize("few", [False, True])
def test_answers_to_one_prompt_are_scored_after_one_reading_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: bool
) -> None:
    """Choices: whatever their order, their prompt is computed once, and each has its likelihood of being alone."""
    monkeypatch.setattr(packed, "few_shapes", lambda *_: few)
    made = engine(make_model(tmp_path))
    asked = prompts(12)
    given = [
        Rendered(ids + [7 + choice] * (1 + choice), [0.0] * len(ids) + [1.0] * (1 + choice))
        for choice in range(4)
        for ids in asked
    ]
    with torch.no_grad():
        expected = []
        for row in given:
            likely = made.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            places = [i for i, weight in enumerate(row.weights) if weight]
            expected.append(-sum(likely[i - 1, row.ids[i]].item() for i in places))
    laid: list[int] = []
    nll = packed.PackedForward.nll

    def counted(self: Any, batch: Any) -> torch.Tensor:
        laid.append(len(batch.ids_T))
        return nll(self, batch)

    made.score(given[:2], lambda n: None)  # what is tried at first is not counted
    monkeypatch.setattr(packed.PackedForward, "nll", counted)
    found = made.score(given, lambda n: None)
    assert [score.nll for score in found] == pytest.approx(expected, rel=1e-4)
    assert [score.tokens for score in found] == [1 + choice for choice in range(4) for _ in asked]
    once = sum(map(len, asked)) + (1 + 2 + 3 + 4) * len(asked)
    assert sum(laid) == (rounded(once) if few else once)
