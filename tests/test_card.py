"""The hub's own reader understands the card, and the card claims no more than the scores show."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from tests.test_report import MODEL, fake_run, write_stage
from tunesmith import runs
from tunesmith.package.card import card
from tunesmith.runs import Run


def front_matter(text: str) -> dict[str, Any]:
    opened, front, _ = re.split(r"^---\n", text, maxsplit=2, flags=re.M)
    assert opened == ""
    found: dict[str, Any] = yaml.safe_load(front)
    return found


def hub_data(text: str) -> Any:
    """The front matter as the hub's own reader has it."""
    return ModelCard(text).data


def set_recipe(run: Run, **data: Any) -> None:
    recipe = yaml.safe_load(run.recipe.read_text())
    recipe["data"] |= data
    run.recipe.write_text(yaml.safe_dump(recipe))


def code_of(text: str) -> str:
    found = re.search(r"^(`{3,})python\n(.*?)\n\1$", text, flags=re.M | re.S)
    assert found
    return found[2]


def test_the_hub_reads_the_front_matter(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    text = card(run, MODEL)
    data = hub_data(text)
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.tags == ["tunesmith", "lora"]
    assert front_matter(text)["base_model_relation"] == "finetune"
    scores = runs.read_json(run.scorecard)
    assert data.model_name == "desk"
    results = {result.metric_name: result for result in data.eval_results or []}
    assert list(results) == list(scores["metrics"])
    for name, result in results.items():
        assert result.metric_value == scores["metrics"][name]["tuned"]["value"]
        assert result.task_type == "text-generation"


def test_the_verdict_and_every_score_are_in_the_body(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    text = card(run, MODEL)
    scores = runs.read_json(run.scorecard)
    assert "**Verdict.** Better than its base. `exact_match` went from 0.033 to 0.800 on 30 held-out rows" in text
    for name, score in scores["metrics"].items():
        line = next(line for line in text.splitlines() if re.match(rf"\| \**{name}\b", line))
        assert f"| {score['n']} |" in line
    assert "100 rows read, 97 accepted, 1 rejected, 2 removed (over_length)" in text
    assert "No safety evaluation was made" in text
    for stage in ("data", "train", "evaluate"):
        manifest = run.complete(stage)
        assert manifest and runs.digest(manifest) in text


def test_not_proven_is_said_plainly(tmp_path: Path) -> None:
    text = card(fake_run(tmp_path, tuned_right=1), MODEL)
    assert "**Not proven** to be better than its base." in text
    assert "An improvement in `exact_match` over the base is not proven." in text


def test_before_evaluation_it_says_so(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    shutil.rmtree(run.stage("evaluate"))
    text = card(run, MODEL)
    assert "Not evaluated" in text and "It was not evaluated" in text
    assert "model-index" not in front_matter(text)
    assert hub_data(text).eval_results is None


def test_scores_of_an_earlier_training_are_not_shown(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    summary = runs.read_json(run.stage("train") / "manifest.json")["summary"]
    write_stage(run, "train", {"adapter/adapter_config.json": "[]"}, ("data",), summary=summary)
    text = card(run, MODEL)
    assert "Not evaluated" in text and "model-index" not in front_matter(text)


def test_scores_that_are_no_numbers_stay_out_of_the_front_matter(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    file = run.stage("evaluate") / "scorecard.json"
    scores = runs.read_json(file)
    scores["metrics"]["perplexity"]["tuned"]["value"] = math.inf
    runs.write_json(file, scores)
    manifest = runs.read_json(run.stage("evaluate") / "manifest.json")
    manifest["outputs"] = runs.outputs_of(run.stage("evaluate"))
    runs.write_json(run.stage("evaluate") / "manifest.json", manifest)
    results = hub_data(card(run, MODEL)).eval_results or []
    assert [r.metric_name for r in results] == [name for name in scores["metrics"] if name != "perplexity"]


def test_a_licence_that_is_not_known_is_not_claimed(tmp_path: Path) -> None:
    text = card(fake_run(tmp_path), MODEL | {"licence": None})
    assert "license" not in front_matter(text)
    assert "licence is not known" in text


def test_no_path_of_this_disk_is_published(tmp_path: Path) -> None:
    folder = MODEL | {"name": "/home/someone/models/own-base", "source": "folder", "hub_id": None}
    text = card(fake_run(tmp_path), folder)
    assert front_matter(text)["base_model"] == "own-base"
    assert "/home/someone" not in text and "/somewhere" not in text and str(tmp_path) not in text


@pytest.mark.parametrize("trusted", [False, True])
def test_remote_code_is_recorded(tmp_path: Path, trusted: bool) -> None:
    text = card(fake_run(tmp_path), MODEL | {"trust_remote_code": trusted})
    assert f"`trust_remote_code`: {str(trusted).lower()}" in text
    assert code_of(text).count("trust_remote_code=True") == (2 if trusted else 0)


@pytest.mark.parametrize("system", [None, 'Say "it\'s"\n```python\nprint(1)\n```', "Ärger: 漢字 \\ {x}"])
def test_the_code_holds_the_system_message(tmp_path: Path, system: str | None) -> None:
    run = fake_run(tmp_path)
    set_recipe(run, system=system)
    text = card(run, MODEL)
    code = code_of(text)
    compile(code, "card", "exec")
    messages = eval(code.split("messages = ")[1].split("\ninputs")[0])
    assert [m["content"] for m in messages if m["role"] == "system"] == ([system] if system else [])
    assert hub_data(text).pipeline_tag == "text-generation"


def test_gate_safety_and_forgetting_stand_in_the_card(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    path = run.stage("evaluate") / "scorecard.json"
    scores = runs.read_json(path)
    assert "By the default gate: **ship" in card(run, MODEL)
    span = {"low": 0.1, "value": 0.2, "high": 0.3}
    condition = {"condition": "forgetting.kl <= 0.05", "met": False, "state": "broken", "why": "0.2 | none of it"}
    scores |= {
        "gate": {"decision": "hold", "enforced": True, "conditions": [condition]},
        "forgetting": {"kl": span | {"n": 204}},
        "safety": {"over_refusal": {"baseline": span, "tuned": span, "difference": span, "n": 40}},
        "judge": {"model": "m", "usage": {"calls": 3}, "agreement": {"kappa": span | {"n": 9}}},
    }
    runs.write_json(path, scores)
    write_stage(run, "evaluate", {}, parents=("data", "train"), verdict=scores["verdict"])
    text = card(run, MODEL)
    assert "gate says **hold: a condition is broken**. It was packaged all the same, by force." in text
    assert r"| `forgetting.kl <= 0.05` | broken | 0.2 \| none of it |" in text
    assert "## Forgetting" in text and "| kl |  | 0.200 [0.100, 0.300] |  | 204 |" in text
    assert "| over refusal | 0.200 [0.100, 0.300] | 0.200 [0.100, 0.300] | +0.200 | 40 |" in text
    assert "| agreement kappa |" in text and "Bias was not measured" in text
    assert "No safety evaluation" not in text and "may have suffered" not in text
