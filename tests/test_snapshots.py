"""Weights at the ends of epochs, as models of their own; and how many tokens are guessed right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tunesmith
from tests.conftest import colour_rows, write_jsonl
from tunesmith.data.prepare import load_rows


@pytest.fixture
def run(recipe: dict[str, Any], tmp_path: Path) -> Any:
    write_jsonl(tmp_path / "validation.jsonl", colour_rows(70)[60:])
    recipe["data"]["split"] = {"validation": str(tmp_path / "validation.jsonl"), "test": 0}
    recipe["train"] |= {
        "epochs": 3,
        "max_steps": None,
        "batch_size": 20,
        "keep_best": False,
        "snapshots": 2,
        "method": {"kind": "sft", "accuracy": True},
    }
    return tunesmith.run(recipe, runs_folder=tmp_path / "runs", stages=("data", "train")).run


def test_the_last_epochs_stay_as_adapters_that_peft_loads(run: Any, tiny_model: Path) -> None:
    assert [p.name for p in sorted(run.snapshots.iterdir())] == ["step-000006", "step-000009"]
    last, final = (load_file(p / "adapter_model.safetensors") for p in (run.snapshots / "step-000009", run.tuned))
    assert all(torch.equal(last[name], final[name]) for name in final | last)
    earlier = load_file(run.snapshots / "step-000006" / "adapter_model.safetensors")
    assert any(not torch.equal(earlier[name], final[name]) for name in final)
    assert (run.snapshots / "step-000006" / "base.json").read_text() == (run.tuned / "base.json").read_text()


def test_token_accuracy_is_what_transformers_and_peft_find(run: Any, tiny_model: Path, renderer: Any) -> None:
    told = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), run.tuned).eval()
    right = tokens = 0
    for row in load_rows(run.stage("data") / "validation.jsonl"):
        rendered = renderer.render(row)
        with torch.no_grad():
            guessed = model(torch.tensor([rendered.ids])).logits[0].argmax(-1).tolist()
        places = [i for i, weight in enumerate(rendered.weights) if weight]
        right += sum(guessed[i - 1] == rendered.ids[i] for i in places)
        tokens += len(places)
    assert told[-1]["validation_token_accuracy"] == pytest.approx(right / tokens)
    assert 0 < right < tokens
