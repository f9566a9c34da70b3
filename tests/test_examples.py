"""What lies in examples/ for reading is what Tunesmith does."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_recipe
from tunesmith.runs import read_jsonl

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_plain_loop_gives_the_weights_of_the_real_one(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe["train"] |= {"keep_best": False, "weight_decay": 0.1, "pack_tokens": 64}
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path).code == 0
    capsys.readouterr()
    runpy.run_path(str(EXAMPLES / "plain_loop.py"))["main"](str(path), tmp_path / "plain")
    said = capsys.readouterr().out
    lines = read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")
    assert len(lines) == 6
    assert all(f"loss {line['loss']:.4f}, gradient {line['grad_norm']:.3f}" in said for line in lines)
    real = load_file(tmp_path / "runs/tiny/train/adapter/adapter_model.safetensors")
    plain = load_file(tmp_path / "plain/adapter/adapter_model.safetensors")
    assert set(real) == set(plain) and len(real) > 0
    for name, tensor in real.items():
        torch.testing.assert_close(plain[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
