"""Adapters that can't be merged: they answer as their own library, or a forward pass spelt out, says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import write_recipe
from tests.test_quantise import resolved
from tunesmith.conversation.render import Rendered

ROWS = [list(range(5, 25)), list(range(40, 52)), list(range(7, 90, 3))]
PROMPTS: list[dict[str, Any]] = [
    {"kind": "prompt", "tokens": 5, "text": "The answer is blue."},
    {"kind": "p-tuning", "tokens": 3, "network": "LSTM"},
    {"kind": "prefix", "tokens": 4, "hidden": 16},
]


@pytest.fixture
def trained(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, request: Any) -> Path:
    recipe["train"] |= {"adapter": request.param, "learning_rate": 0.05}
    said = tunesmith("run", write_recipe(tmp_path, recipe))
    assert said.code == 0, said.err
    return tmp_path / "runs/tiny"


def engine(recipe: dict[str, Any], adapter: Path) -> Any:
    from tunesmith.inference.transformers_engine import TransformersEngine
    from tunesmith.models.machine import machine

    return TransformersEngine(resolved_as(Path(recipe["model"]), adapter), machine(), adapter, "float32")


def resolved_as(folder: Path, adapter: Path) -> Any:
    import json
    from dataclasses import replace

    return replace(resolved(folder), identity=json.loads((adapter / "base.json").read_text())["identity"])


def no_tick(count: float) -> None:
    pass


@pytest.mark.parametrize("trained", PROMPTS, indirect=True, ids=lambda p: p["kind"])
def test_virtual_tokens_score_and_answer_as_peft_says(trained: Path, recipe: dict[str, Any]) -> None:
    """Scores are PEFT's on the packaged folder; answers, batched and with a cache, its arg max over the whole row."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    package = trained / "package/model"
    base = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(package / "adapter")).eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        given = torch.tensor([ids])
        return theirs(input_ids=given, attention_mask=torch.ones_like(given)).logits[0, -len(ids) :].float()

    ours = engine(recipe, trained / "train/adapter")
    found = ours.score([Rendered(ids, [0.0] + [1.0] * (len(ids) - 1)) for ids in ROWS], no_tick)
    for ids, score in zip(ROWS, found, strict=True):
        expected = torch.nn.functional.cross_entropy(logits(ids)[:-1], torch.tensor(ids[1:]), reduction="sum")
        assert score.nll == pytest.approx(expected.item(), rel=1e-4)
    for ids, answer in zip(ROWS, ours.generate(ROWS, 5, [], no_tick), strict=True):
        whole = list(ids)
        for _ in range(5):
            whole.append(int(logits(whole)[-1].argmax()))
        assert answer == whole[len(ids) :]


@pytest.mark.parametrize(
    "trained",
    [{"kind": "bottleneck", "style": s, "size": 8} for s in ("houlsby", "pfeiffer", "parallel")],
    indirect=True,
    ids=lambda adapter: adapter["style"],
)
def test_bottlenecks_are_what_the_papers_say(trained: Path, recipe: dict[str, Any]) -> None:
    """Houlsby: after attention and MLP; Pfeiffer: after the MLP alone; parallel: beside the MLP, of what it reads."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = trained / "package/model"
    weights = load_file(folder / "adapter/bottleneck.safetensors")
    style = recipe["train"]["adapter"]["style"]
    assert len(weights) == 2 * 4 * (2 if style == "houlsby" else 1)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def added(part: str, x: torch.Tensor) -> torch.Tensor:
        down, low, up, high = (
            weights[f"{part}.bottleneck.{n}"] for n in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        return torch.relu(x @ down.T + low) @ up.T + high

    with torch.no_grad():
        ids = torch.tensor([ROWS[0]])
        x = plain.model.embed_tokens(ids)
        places = torch.arange(ids.shape[1])[None]
        turn = plain.model.rotary_emb(x, places)
        for number, layer in enumerate(plain.model.layers):
            name = f"model.layers.{number}"
            y = layer.self_attn(layer.input_layernorm(x), position_embeddings=turn, attention_mask=None)[0]
            x = x + y + (added(f"{name}.self_attn", y) if style == "houlsby" else 0)
            y = layer.mlp(inner := layer.post_attention_layernorm(x))
            x = x + y + added(f"{name}.mlp", inner if style == "parallel" else y)
        expected = plain.lm_head(plain.model.norm(x))[0].log_softmax(-1)
    ours = engine(recipe, trained / "train/adapter")
    (found,) = ours.score([Rendered(ROWS[0], [0.0] + [1.0] * (len(ROWS[0]) - 1))], no_tick)
    nll = -expected[torch.arange(len(ROWS[0]) - 1), torch.tensor(ROWS[0][1:])].sum().item()
    assert found.nll == pytest.approx(nll, rel=1e-4)
    assert ours._forward.packed


def test_an_adapter_of_another_base_is_refused(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    from tunesmith.errors import ModelError
    from tunesmith.models.load import load_tuned

    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    with pytest.raises(ModelError, match="was made for another base"):
        load_tuned(resolved(Path(recipe["model"])), tmp_path / "runs/tiny/train/adapter", torch.float32)
