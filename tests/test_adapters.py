"""Every kind of adapter, in each precision: trained, gone on with after a stop, merged, packaged; or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.cells import ADAPTERS
from tests.conftest import write_recipe
from tunesmith.runs import read_jsonl

KINDS: dict[str, dict[str, Any]] = {
    **{name: kind for name, kind in ADAPTERS.items() if name not in ("tokens", "lora, loftq", "partial")},
    "lora, dropout": {"kind": "lora", "rank": 4, "dropout": 0.2},
    "last layer": {"kind": "partial", "last_layers": 1},
    "embeddings": {"kind": "partial", "only": "embeddings"},
    "norms": {"kind": "partial", "only": "norms"},
    "names": {"kind": "partial", "names": ["*.mlp.*"]},
}
# The others' journeys over bfloat16 are taken in long tests; tests/test_cells.py trains all of them.
OVER_BFLOAT16 = ("lora", "dora", "vera", "prompt", "full")
JOURNEYS = [
    pytest.param(name, precision, marks=[] if precision == "float32" or name in OVER_BFLOAT16 else pytest.mark.long)
    for name in KINDS
    for precision in ("float32", "bfloat16")
]
BESIDE = {"prompt", "p-tuning", "prefix", "bottleneck"}  # can't be merged


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = [p for name in ("adapter", "model") for p in (run / "train" / name).glob("*.safetensors")]
    assert len(found) == 1
    return load_file(found[0])


def files(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for name in ("adapter", "model") for p in (run / "train" / name).glob("*.safeten*")}


@pytest.mark.parametrize(("name", "precision"), JOURNEYS)
def test_each_kind_trains_goes_on_exactly_and_becomes_a_model(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, name: str, precision: str
) -> None:
    recipe["train"] |= {"adapter": KINDS[name], "precision": precision, "max_steps": 4, "learning_rate": 0.003}
    recipe["package"] = {"precision": "float32"}
    path, run = write_recipe(tmp_path, recipe), tmp_path / "runs/tiny"
    assert tunesmith("train", path).code == 0
    whole = files(run)
    losses = [line["loss"] for line in read_jsonl(run / "metrics.jsonl")]
    assert min(losses[1:]) < losses[0]
    if "init" not in KINDS[name]:  # theirs starts at the base's own weights, with a new base below
        assert any(t.abs().max() > 0 for t in weights(run).values())

    for made in ("adapter", "model", "checkpoints/step-000004"):
        shutil.rmtree(run / "train" / made, ignore_errors=True)
    (run / "train/manifest.json").unlink()
    said = tunesmith("train", path)
    assert said.code == 0 and "Going on from step 2" in said.err
    assert files(run) == whole

    said = tunesmith("run", path, "--json")
    assert said.code == 0, said.err
    check = json.loads((run / "package/manifest.json").read_text())["check"]
    assert check["same_next_token"] > 0.99
    card = (run / "README.md").read_text()
    assert f"- {KINDS[name]['kind']}\n" in card.partition("tags:")[2][:60]
    base = load_file(Path(recipe["model"]) / "model.safetensors")
    merged = load_file(run / "package/model/model.safetensors")
    changed = {key for key in base if not torch.equal(base[key].float(), merged[key].float())}
    if KINDS[name]["kind"] == "partial":
        part = {"last layer": ".layers.1.", "embeddings": "embed", "norms": "norm", "names": ".mlp."}[name]
        assert changed and all(part in key for key in changed)
    elif KINDS[name]["kind"] in BESIDE:
        assert not changed and (run / "package/model/adapter").is_dir() and "lies beside it" in card
    else:
        assert any(".mlp." in key for key in changed)


def test_loras_start_from_the_bases_own_directions_is_saved_for_the_base_as_it_was(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["train"]["adapter"] = KINDS["lora, pissa"]
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    config = json.loads((tmp_path / "runs/tiny/train/adapter/adapter_config.json").read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True


def test_loras_b_learns_at_its_own_rate(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """With one step of AdamW every weight moves by its rate: B, which starts at zero, by b_rate times A's."""
    recipe["train"] |= {"adapter": KINDS["lora+"], "max_steps": 1, "warmup": 0, "schedule": "constant"}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    moved = [t.abs().median().item() for name, t in weights(tmp_path / "runs/tiny").items() if "lora_B" in name]
    assert all(step == pytest.approx(4 * recipe["train"]["learning_rate"], rel=0.01) for step in moved)


@pytest.mark.parametrize(
    "name", ["lora", "dora", "loha", "vera", "oft", "ia3", "bottleneck, houlsby", "prompt", "last layer", "norms"]
)
def test_what_is_frozen_gets_no_gradient(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Looked at between the backward pass and the step: a gradient is where a weight is trained, and nowhere else."""
    from tunesmith.train import train as loop

    base = set(load_file(Path(recipe["model"]) / "model.safetensors"))
    seen: list[tuple[int, int]] = []
    update = loop.update

    def looked_at(split: Any, rate: float) -> Any:
        frozen = {n: p for n, p in split.step.model.named_parameters() if not p.requires_grad}
        assert not [n for n, p in frozen.items() if p.grad is not None]
        trained = {n: p for n, p in split.step.model.named_parameters() if p.requires_grad}
        assert trained and all(p.grad is not None for p in trained.values())
        seen.append((len(frozen), len(trained)))
        return update(split, rate)

    monkeypatch.setattr(loop, "update", looked_at)
    recipe["train"] |= {"adapter": KINDS[name], "max_steps": 1}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    frozen, trained = seen[-1]
    whole_model = KINDS[name]["kind"] == "partial"
    assert frozen + trained == len(base) if whole_model else frozen >= len(base)


def test_plan_counts_what_training_trains(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    for name in ("lora", "dora", "loha", "adalora", "prompt", "prefix", "bottleneck, houlsby", "full", "last layer"):
        recipe["train"]["adapter"] = KINDS[name]
        recipe |= {"name": name.replace(" ", "-").replace(",", "")}
        path = write_recipe(tmp_path, recipe)
        planned = tunesmith("plan", path, "--json").json["trained_parameters"]
        assert tunesmith("train", path).code == 0
        manifest = json.loads((tmp_path / "runs" / recipe["name"] / "train/manifest.json").read_text())
        assert planned == manifest["summary"]["parameters"]["trained"], name


@pytest.mark.parametrize(
    ("adapter", "parts"),
    [
        ({"kind": "lora", "rank": 99}, ["train.adapter.rank", "is 99", "more than layer"]),
        ({"kind": "lora", "targets": []}, ["train.adapter.targets"]),
        ({"kind": "prompt", "tokens": 512}, ["train.adapter.tokens", "the model reads 512 tokens at most"]),
        ({"kind": "boft", "butterflies": 2}, ["train.adapter.butterflies", "there is one round only"]),
        ({"kind": "full", "lisa": {"layers": 3}}, ["train.adapter.lisa.layers", "is 3, the model has 2 layers"]),
        ({"kind": "lora", "targets": ["qproj"]}, ["train.adapter.targets", "no layer fits", "q_proj"]),
        ({"kind": "oft", "block_size": 7}, ["train.adapter.block_size", "does not divide"]),
        ({"kind": "partial", "names": ["*.nothing"]}, ["train.adapter", "no weight fits", "embed_tokens"]),
        ({"kind": "partial"}, ["train.adapter", "needs last_layers, only or names"]),
        ({"kind": "full", "rank": 3}, ["train.adapter.rank", "unknown key"]),
    ],
)
def test_what_does_not_suit_the_model_is_said(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, adapter: dict[str, Any], parts: list[str]
) -> None:
    recipe["train"]["adapter"] = adapter
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "Traceback" not in said.err
    for part in parts:
        assert part in said.err.replace("\n", " "), said.err
