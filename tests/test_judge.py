"""Answers while training: read at each validation, scored as evaluation scores them, and without any trace in the
weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_jsonl, write_recipe
from tests.test_method_runs import PAIRS, PLAIN
from tunesmith.runs import read_json, read_jsonl, write_json

ADAPTER = "train/adapter/adapter_model.safetensors"


def test_answers_are_kept_and_change_no_weight(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    recipe["train"] |= {"validate_every": 2, "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.2}}
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("run", path, "--set", "train.samples=2").code == 0
    run = tmp_path / "runs/tiny"
    kept = read_jsonl(run / "train/samples.jsonl")
    assert [line["step"] for line in kept] == [2, 2, 4, 4, 6, 6]
    rows = {row["id"]: row["messages"] for row in read_jsonl(run / "data/validation.jsonl")}
    for line in kept:
        assert (
            line["reference"] == rows[line["row"]][-1]["content"] and line["asked"] in rows[line["row"]][-2]["content"]
        )
    page = (run / "report.html").read_text()
    assert page.count("data-sample=") == 2
    assert tunesmith("train", path, "--set", "train.samples=0", "--set", "name=silent").code == 0
    assert (run / ADAPTER).read_bytes() == (tmp_path / "runs/silent" / ADAPTER).read_bytes()
    assert "train: up to date" in tunesmith("train", path, "--set", "train.samples=1").err


def test_the_best_by_a_task_metric_is_kept_and_stops(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """The score of the last sampled answers is what the metric gives for the tuned model's own answers."""
    recipe["data"]["split"] = {"validation": 8, "test": 8}
    recipe["train"] |= {
        "max_steps": 60, "epochs": 40, "validate_every": 4, "best_by": "exact_match", "early_stopping": 3,
        "samples": 8, "learning_rate": 0.02, "schedule": "constant",
    }  # fmt: skip
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path).code == 0
    run = tmp_path / "runs/tiny"
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "validation_exact_match" in line]
    told = json.loads((run / "train/manifest.json").read_text())["summary"]
    best = max(line["validation_exact_match"] for line in lines)
    first = next(line for line in lines if line["validation_exact_match"] == best)
    assert told["best_by"] == "exact_match" and told["best_value"] == best and told["best_step"] == first["step"]
    assert told["best_validation_loss"] == first["validation_loss"]
    assert lines[-1]["step"] in (first["step"] + 12, 60)
    for line in lines:
        answers = [s for s in read_jsonl(run / "train/samples.jsonl") if s["step"] == line["step"]]
        right = sum(s["answer"].strip() == s["reference"] for s in answers)
        assert line["validation_exact_match"] == pytest.approx(right / 8)


@pytest.mark.parametrize(
    ("by", "method", "rows", "best"),
    [
        ("rewards_margin", "dpo", PAIRS, max),
        ("rewards_rejected", "dpo", PAIRS, min),
        ("accuracy", "classify", PLAIN, max),
        ("loss_1", "sft", PLAIN, min),
    ],
)
def test_the_best_by_a_figure_of_the_validation_is_kept(
    tunesmith: Any, recipe: Any, tmp_path: Path, by: str, method: str, rows: Any, best: Any
) -> None:
    """Whichever way it is better; a method's own figure comes before a metric of that name."""
    sources = [{"path": str(write_jsonl(tmp_path / f"{n}.jsonl", rows[n::2])), "tag": str(n)} for n in range(2)]
    recipe["data"]["sources"] = sources
    recipe["train"] |= {"method": method, "best_by": by, "validate_every": 1, "max_steps": 6, "samples": 0}
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 0, said.err
    values = [line[f"validation_{by}"] for line in read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")]
    told = json.loads((tmp_path / "runs/tiny/train/manifest.json").read_text())["summary"]
    assert len(values) == 6 and told["best_by"] == by
    assert told["best_value"] == best(values) and told["best_step"] == 1 + values.index(best(values))


def test_best_by_what_is_not_there(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("train", path, "--set", "train.best_by=exact_mach")
    assert said.code == 2 and "did you mean 'exact_match'" in said.err
    said = tunesmith("train", path, "--set", "train.best_by=rewards_accuracy")  # sft has no rewards
    assert said.code == 2 and "no metric and no figure of this method is called 'rewards_accuracy'" in said.err
    said = tunesmith("train", path, "--set", "train.best_by=loss_shop")
    assert said.code == 2 and "the validation rows have fewer than two tags" in " ".join(said.err.split())
    said = tunesmith("train", path, "--set", "train.best_by=rouge_l", "--set", "data.split.validation=0")
    assert said.code == 2 and "train.best_by needs validation rows" in said.err


def test_a_checkpoint_of_other_code_or_shape_is_not_loaded(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path).code == 0
    run = tmp_path / "runs/tiny"
    (run / "train/manifest.json").unlink()
    newest = sorted((run / "train/checkpoints").glob("step-*"))[-1]
    state = read_json(newest / "state.json")
    write_json(newest / "state.json", state | {"format": 99})
    said = tunesmith("train", path)
    assert said.code == 2 and "written by other code (format 99" in said.err and newest.is_dir()
    write_json(newest / "state.json", state)
    from safetensors.torch import load_file, save_file

    tensors = load_file(newest / "state.safetensors")
    name = next(n for n in tensors if n.startswith("weight/"))
    tensors[name] = tensors[name][:1].clone()
    save_file(tensors, newest / "state.safetensors")
    said = tunesmith("train", path)
    assert said.code == 2 and "Remove the run's train folder" in said.err
