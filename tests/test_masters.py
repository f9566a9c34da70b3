"""Training a model's own weights in bfloat16 over float32 masters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_recipe


def saved(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "train/model/model.safetensors")


def test_a_plain_loop_with_masters_gives_the_same_weights(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """Three steps of SGD on float32 masters of a bfloat16 model, rows one at a time, gradients added in float32."""
    from transformers import AutoModelForCausalLM

    from tunesmith.data.prepare import load_rows
    from tunesmith.models.load import load_renderer
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection
    from tunesmith.train.batching import Schedule

    recipe["train"] |= {"adapter": "full", "precision": "bfloat16", "max_steps": 3, "keep_best": False, "warmup": 0}
    recipe["train"] |= {"optimizer": {"kind": "sgd", "momentum": 0}, "schedule": "constant", "learning_rate": 0.001}
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--set", "train.pack_tokens=64", "--json")
    assert said.code == 0 and said.json["train"]["precision"] == "bfloat16"
    ours = saved(tmp_path / "runs/tiny")
    assert all(t.dtype == torch.float32 for t in ours.values())

    renderer = load_renderer(resolve(ModelSection(name=recipe["model"])))
    rows = [renderer.render(row) for row in load_rows(tmp_path / "runs/tiny/data/train.jsonl")]
    model = AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.float32)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = {name: p.clone() for name, p in masters.items()}
    model.to(torch.bfloat16)
    schedule = Schedule.of(len(rows), 4, 1, 3, 7)
    for step in range(3):
        chosen = [rows[i] for i in schedule.step(step)]
        gradients = {name: torch.zeros_like(p) for name, p in masters.items()}
        for row in chosen:
            labels = torch.tensor([[t if w else -100 for t, w in zip(row.ids, row.weights, strict=True)]])
            loss = model(torch.tensor([row.ids]), labels=labels).loss * row.trained
            (loss / sum(r.trained for r in chosen)).backward()
            for name, p in model.named_parameters():
                gradients[name] += p.grad.float()
                p.grad = None
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, p in model.named_parameters():
            masters[name] -= 0.001 * min(1.0, 1.0 / norm.item()) * gradients[name]
            p.data.copy_(masters[name])
    for name, theirs in masters.items():
        step_ours, step_theirs = ours[name] - start[name], theirs - start[name]
        assert (step_ours - step_theirs).norm() < 0.1 * step_theirs.norm(), name


def test_steps_too_small_for_bfloat16_add_up(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """Six steps of 1e-6 move every weight, by that much; rounding each to bfloat16 would lose them."""
    recipe["train"] |= {"adapter": "full", "precision": "bfloat16", "learning_rate": 1e-6, "schedule": "constant"}
    recipe["train"] |= {"warmup": 0, "keep_best": False, "optimizer": "lion"}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    before, after = load_file(Path(recipe["model"]) / "model.safetensors"), saved(tmp_path / "runs/tiny")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (after[name] - before[name]).abs()
    assert moved.max() < 7e-6 and moved.median() > 5e-7
    assert not torch.equal(after[name], after[name].bfloat16().float())


@pytest.mark.parametrize("last", [{"kind": "l2"}, {"kind": "ewc"}, {"kind": "kl"}])
def test_terms_against_forgetting_reach_the_masters(
    tunesmith: Any, recipe: Any, tmp_path: Path, last: dict[str, Any]
) -> None:
    rows = recipe["data"]["sources"][0]["path"]
    recipe["train"] |= {"adapter": "full", "precision": "bfloat16", "max_steps": 3}
    recipe["train"]["keep"] = [last if last["kind"] == "l2" else last | {"rows": rows}]
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0 and said.json["train"]["keep"][f"keep_{last['kind']}"] > 0


def test_plan_counts_the_masters(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    recipe["train"] |= {"adapter": {"kind": "partial", "last_layers": 1}, "precision": "bfloat16"}
    path = write_recipe(tmp_path, recipe)
    planned = tunesmith("plan", path, "--json").json
    assert planned["memory"]["masters"] == 4 * planned["trained_parameters"]
    assert planned["memory"]["weights"] == 2 * planned["parameters"]
    assert "masters" not in tunesmith("plan", path, "--set", "train.precision=float32", "--json").json["memory"]
