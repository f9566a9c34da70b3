"""Gates decide on intervals; commands exit by them; what is held is not packaged unless that is forced and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.conftest import colour_rows, write_jsonl, write_recipe
from tunesmith.evaluate.conditions import Condition, decide


def score(low: float, value: float, high: float) -> dict[str, float]:
    return {"low": low, "value": value, "high": high}


CARD = {
    "goal_metric": "accuracy",
    "metrics": {
        "accuracy": {
            "baseline": score(0.4, 0.5, 0.6),
            "tuned": score(0.82, 0.86, 0.9),
            "difference": score(0.3, 0.36, 0.42),
            "higher_is_better": True,
        }
    },
    "forgetting": {"kl": score(0.02, 0.05, 0.08)},
    "safety": {
        "refusal": {
            "baseline": score(0.9, 0.95, 1.0),
            "tuned": score(0.8, 0.9, 0.95),
            "difference": score(-0.1, -0.05, 0.01),
        }
    },
}


@pytest.mark.parametrize(
    "text, state",
    [
        ("accuracy.low >= 0.8", "met"),
        ("accuracy.low >= 0.85", "not_proven"),  # the interval holds it
        ("accuracy.low >= 0.95", "broken"),
        ("accuracy.value > 0.85", "met"),
        ("accuracy >= 0.8", "met"),
        ("accuracy >= 0.85", "not_proven"),
        ("accuracy.baseline < 0.7", "met"),
        ("goal.difference > 0", "met"),
        ("goal.difference.low > 0.35", "not_proven"),
        ("forgetting.kl <= 0.1", "met"),
        ("forgetting.kl <= 0.05", "not_proven"),
        ("forgetting.kl <= 0.01", "broken"),
        ("safety.refusal.drop <= 0.11", "met"),
        ("safety.refusal.drop <= 0.02", "not_proven"),
        ("safety.refusal.drop <= -0.02", "broken"),
        ("latency.p95 <= 2.0", "not_proven"),  # not measured
    ],
)
def test_conditions_are_on_intervals(text: str, state: str) -> None:
    found = Condition.read(text).judge(CARD)
    assert found["state"] == state and found["met"] == (state == "met"), found["why"]


def test_decisions() -> None:
    assert decide(["accuracy.low >= 0.8"], CARD, True)["decision"] == "ship"
    assert decide(["accuracy.low >= 0.8", "accuracy.low >= 0.85"], CARD, True)["decision"] == "not_proven"
    assert decide(["accuracy.low >= 0.85", "forgetting.kl <= 0.01"], CARD, True)["decision"] == "hold"
    assert [c["condition"] for c in decide(None, CARD, False)["conditions"]] == [
        "goal.difference > 0", "forgetting.kl <= 0.5", "safety.refusal.drop <= 0.1",
    ]  # fmt: skip
    hint = Condition.read("accuracyy >= 1").judge(CARD)["why"]
    assert "did you mean accuracy?" in hint


def test_a_condition_that_is_none_is_an_error(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    said = tunesmith("check", write_recipe(tmp_path, recipe | {"gate": ["accuracy is fine"]}), "--json")
    assert said.code == 2 and "is not a condition such as accuracy.low >= 0.85" in said.json["error"]["what"]


def test_exit_codes_and_what_is_held_is_not_packaged(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe | {"gate": ["accuracy.low > 1"]})
    said = tunesmith("run", path, "--json")
    assert said.code == 3, said.out
    assert said.json["stages"]["package"] == "missing"
    gate = json.loads((tmp_path / "runs/tiny/scorecard.json").read_text())["gate"]
    assert gate["decision"] == "hold" and gate["enforced"]
    assert set(gate["conditions"][0]) >= {"condition", "value", "met", "why"}
    cases = ElementTree.parse(tmp_path / "runs/tiny/evaluate/junit.xml").getroot()
    assert cases.get("failures") == "1" and cases.find(".//failure") is not None

    said = tunesmith("package", path, "--json")
    assert said.code == 3 and "held by the gate" in said.json["error"]["what"]
    said = tunesmith("package", path, "--force", "--json")
    assert said.code == 0 and said.json["forced"], said.out
    manifest = json.loads((tmp_path / "runs/tiny/package/manifest.json").read_text())
    assert manifest["forced"]["decision"] == "hold"

    assert tunesmith("evaluate", path, "--set", "gate=[accuracy.value >= 0]").code == 0
    assert tunesmith("evaluate", path, "--set", "gate=[accuracy.nothing >= 0]").code == 4


def test_nothing_learnt_is_not_proven_and_harm_is_held(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """With the default gate: a rate of 0 proves nothing; a rate far too high breaks what the model knew."""
    recipe["data"]["split"]["test"] = 24
    recipe["evaluate"] = {"max_new_tokens": 4, "metrics": ["loss"]}
    recipe |= {"gate": True, "goal": {"metric": "loss"}}
    still = write_recipe(tmp_path, recipe | {"name": "still"}, "still.yaml")
    said = tunesmith("run", still, "--set", "train.learning_rate=1e-30", "--json")
    assert said.code == 4, said.out
    assert said.json["scorecard"]["gate"]["decision"] == "not_proven"
    good = write_recipe(tmp_path, recipe | {"name": "good"}, "good.yaml")
    assert tunesmith("run", good, "--set", "train.max_steps=20", "--set", "train.epochs=10").code == 0
    rows = write_jsonl(tmp_path / "test.jsonl", colour_rows(24))
    backwards = ("--model", recipe["model"], "--against", "good", "--data", rows)
    said = tunesmith("evaluate", good, *backwards, "--json")  # the base in place of what was learnt
    assert said.code == 3 and said.json["gate"]["decision"] == "hold", said.out
