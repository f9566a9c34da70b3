"""Several data sets as tasks of one run: each has its own score, in training and in the scorecard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import colour_rows, make_tokenizer, write_jsonl, write_recipe
from tunesmith.runs import read_json, read_jsonl


def loss_by_transformers(model: str, adapter: Path, rows: list[dict[str, Any]]) -> float:
    """Mean negative log-likelihood of the answers' tokens, a row at a time."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = make_tokenizer()
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter).eval()
    total, count = 0.0, 0
    for row in rows:
        whole = tokenizer.apply_chat_template(row["messages"], tokenize=False).removesuffix("\n")
        asked = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole))
        labels = [-100] * len(before) + ids[len(before) :]
        with torch.no_grad():
            loss = tuned(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
        total, count = total + loss * (len(ids) - len(before)), count + len(ids) - len(before)
    return total / count


def test_each_task_has_its_own_score(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    sums = [{"prompt": f"What is {i} and {i}?", "completion": f"It is {2 * i}"} for i in range(40)]
    files = {"colours": write_jsonl(tmp_path / "c.jsonl", colour_rows(40)), "sums": write_jsonl(tmp_path / "s", sums)}
    recipe["data"] = {
        "sources": [
            {"path": str(p), "tag": t, "format": "jsonl", "weight": 1 + (t == "sums")} for t, p in files.items()
        ],
        "split": {"validation": 8, "test": 12, "stratify": "tag"},
    }
    recipe["train"] |= {"keep_best": False, "pack_tokens": 64}
    path, run = write_recipe(tmp_path, recipe), tmp_path / "runs/tiny"
    said = tunesmith("run", path)
    assert said.code == 0, said.err

    last = read_jsonl(run / "metrics.jsonl")[-1]
    held_out = read_jsonl(run / "data/validation.jsonl")
    for tag in files:
        rows = [row for row in held_out if row["metadata"]["tag"] == tag]
        assert len(rows) == 4
        expected = loss_by_transformers(recipe["model"], run / "train/adapter", rows)
        assert last[f"validation_loss_{tag}"] == pytest.approx(expected, rel=1e-4)
    expected = loss_by_transformers(recipe["model"], run / "train/adapter", held_out)
    assert last["validation_loss"] == pytest.approx(expected, rel=1e-4)
    summary = read_json(run / "train/manifest.json")["summary"]
    assert summary["tasks"] == {tag: last[f"validation_loss_{tag}"] for tag in files}

    card, answers = read_json(run / "evaluate/scorecard.json"), read_jsonl(run / "evaluate/answers.jsonl")
    tags = {row["id"]: row["metadata"]["tag"] for row in read_jsonl(run / "data/test.jsonl")}
    assert set(card["tasks"]) == set(files) and set(card["tasks"]["sums"]) == set(card["metrics"])
    for tag, scores in card["tasks"].items():
        mine = [a for a in answers if tags[a["id"]] == tag]
        mean = sum(a["tuned"]["score"] for a in mine) / len(mine)
        goal = scores[card["goal_metric"]]
        assert goal["tuned"]["value"] == pytest.approx(mean) and goal["n"] == len(mine) == 6
    assert f"{card['goal_metric']}, sums (6)" in said.out
    report = (run / "report.html").read_text()
    assert "Each task" in report and "Validation loss, colours" in report


def test_one_tag_is_no_several_tasks(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["data"]["sources"][0]["tag"] = "colours"
    assert tunesmith("run", write_recipe(tmp_path, recipe)).code == 0
    assert not any("validation_loss_" in key for key in read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")[-1])
    assert json.loads((tmp_path / "runs/tiny/evaluate/scorecard.json").read_text())["tasks"] == {}
