"""Parity and resume on the embedded model: SmolLM2-135M, float32, a few rows of questions and answers."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import plain
from tests.conftest import colour_rows, write_jsonl, write_recipe
from tunesmith.runs import read_jsonl

pytestmark = pytest.mark.long
MODEL = "smollm2-135m-instruct"
ADAPTER = "train/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder() -> Path:
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    return resolve(ModelSection(name=MODEL)).path


@pytest.fixture
def keys(recipe: dict[str, Any], tmp_path: Path, folder: Path) -> dict[str, Any]:
    """Four steps of three rows of uneven length."""
    rows = [row | {"prompt": "Well. " * (i * 5 % 11) + row["prompt"]} for i, row in enumerate(colour_rows(20))]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe |= {"model": MODEL}
    recipe["data"]["split"] = {"validation": 2, "test": 2}
    recipe["train"] |= {
        "max_steps": 4, "epochs": 3, "batch_size": 3, "learning_rate": 0.001, "keep_best": False, "checkpoint_every": 1,
    }  # fmt: skip
    return recipe


def test_a_plain_loop_gives_the_same_losses_gradients_and_weights(
    tunesmith: Any, keys: dict[str, Any], tmp_path: Path, folder: Path
) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    assert tunesmith("train", write_recipe(tmp_path, keys)).code == 0
    run = tmp_path / "runs/tiny"
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = read_jsonl(run / "data/train.jsonl")
    done = plain.train(folder, config, rows, steps=4, batch_size=3, epochs=3, rate=0.001)
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(done.losses, rel=1e-3)
    assert [line["grad_norm"] for line in lines] == pytest.approx(done.norms, rel=5e-3)
    ours, theirs = load_file(run / ADAPTER), get_peft_model_state_dict(done.model)
    assert set(ours) == set(theirs)
    off = sum((ours[name] - theirs[name]).norm() ** 2 for name in ours) ** 0.5
    moved = sum(theirs[name].norm() ** 2 for name in ours if "lora_B" in name) ** 0.5  # B starts at zero
    assert off < 0.01 * moved


def test_packed_rows_are_single_rows_in_loss_and_every_gradient(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.test_packed import rows
    from tunesmith.models.packed import PackedForward

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    with torch.no_grad():  # as random as they come, a layer's update would be as large as the layer
        for name, parameter in model.named_parameters():
            parameter.mul_(0.05 if "lora_B" in name else 1)
    given, trained = rows(12), {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = torch.stack([plain.nll(model, row.ids, plain.labels(row)) for row in given]).sum()
    total.backward()
    expected = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    model.zero_grad()
    forward = PackedForward(model, given)
    assert forward.packed and "30 attentions" in forward.why, forward.why
    found = forward.nll(forward.pack(given)).sum()
    found.backward()
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-3)
    assert set(expected) == set(trained)
    for name, gradient in expected.items():
        assert (trained[name].grad - gradient).norm() < 1e-3 * gradient.norm(), name


def test_a_kill_at_a_random_moment_ends_in_the_same_adapter(keys: dict[str, Any], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith", "train", str(write_recipe(tmp_path, keys))]
    subprocess.run([*command, "--runs", str(tmp_path / "calm")], check=True, capture_output=True)
    goal = random.randint(1, 3)
    stormy = subprocess.Popen(
        [*command, "--runs", str(tmp_path / "stormy")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(read_jsonl(tmp_path / "stormy/tiny/metrics.jsonl")) < goal and stormy.poll() is None:
        time.sleep(0.01)
    stormy.kill()
    assert stormy.wait() != 0, goal
    subprocess.run([*command, "--runs", str(tmp_path / "stormy")], check=True, capture_output=True)
    one, other = ((tmp_path / name / "tiny" / ADAPTER).read_bytes() for name in ("calm", "stormy"))
    assert one == other, goal
    assert [line["step"] for line in read_jsonl(tmp_path / "stormy/tiny/metrics.jsonl")] == list(range(1, 5))
