"""The merged model is what it says it is, in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_plain_transformers_loads_the_package_and_agrees_with_the_adapter(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe["package"] = {"precision": precision}
    said = tunesmith("run", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out
    folder = tmp_path / "runs/tiny/package/model"
    check = json.loads((folder.parent / "manifest.json").read_text())["check"]
    assert check["largest_difference"] <= check["tolerance"]
    assert check["precision"] == ("float32" if precision == "auto" else precision)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.float32)
    adapter = PeftModel.from_pretrained(base, tmp_path / "runs/tiny/train/adapter")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What colour is it?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.no_grad():
        expected, found = adapter(input_ids=ids).logits, merged(input_ids=ids).logits
    near = 1e-4 if precision == "auto" else 0.3
    assert (expected - found).abs().max() <= near * expected.std()
    assert merged.generation_config.eos_token_id == [tokenizer.eos_token_id]


def test_a_merge_that_drifts_fails_the_stage_and_leaves_no_model(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["package"] = {"precision": "bfloat16", "tolerance": 1e-6}
    said = tunesmith("run", write_recipe(tmp_path, recipe))
    assert said.code == 2
    assert "merged and adapter differ" in said.err and "package.precision: float32" in said.err
    assert not (tmp_path / "runs/tiny/package").exists()


def test_where_rounding_would_change_the_answers_the_weights_stay_float32(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base16"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    recipe |= {"model": str(base), "package": {"tolerance": 1e-3}}
    said = tunesmith("run", write_recipe(tmp_path, recipe))
    assert said.code == 0, said.err
    assert "rounding the merged weights to bfloat16 would change the answers" in said.err
    check = json.loads((tmp_path / "runs/tiny/package/manifest.json").read_text())["check"]
    assert (check["precision"], check["instead_of"]) == ("float32", "bfloat16")
    assert check["largest_difference"] <= 1e-3


def test_python_runs_and_chats(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    import tunesmith as ts

    run = ts.run(recipe, runs_folder=tmp_path / "runs")
    assert run.scorecard is not None and run.scorecard["n"] == 8
    assert isinstance(run.chat("What colour is it?"), str)
    assert isinstance(ts.open_run("tiny", tmp_path / "runs").chat("What?", base=True), str)
    said = tunesmith("chat", "tiny", "--say", "What colour is it?", "--base", "--json")
    assert said.code == 0 and set(said.json) == {"prompt", "tuned", "base"}


def test_a_chat_is_with_what_the_run_is_now(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with a model that an earlier training of it, or another folder's run of the same name, left in memory."""
    import tunesmith as ts

    answers = set()
    for folder, rate in (("here", 0.01), ("here", 0.05), ("there", 0.02)):
        (tmp_path / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / folder)
        write_recipe(Path(), recipe | {"train": recipe["train"] | {"learning_rate": rate}})
        ts.run("tiny.yaml", (), "runs", ("data", "train"))
        if rate == 0.01:
            first = ts.open_run("tiny", "runs")
        result = first if rate == 0.05 else ts.open_run("tiny", "runs")
        answers.add(result.chat("What colour is it?", max_new_tokens=12))
    assert len(answers) == 3
