"""Gates decide on intervals; commands exit by them; what is held is not packaged unless that is forced and recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.conftest import colour_rows, write_jsonl, write_recipe
from tunesmith.evaluate.conditions import Condition, decide
from tunesmith.intervals import between, quantile
from tunesmith.scores import spanned


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


@pytest.mark.parametrize(("rows", "state"), [(20, "not_proven"), (71, "not_proven"), (72, "met"), (300, "met")])
def test_a_latency_of_too_few_rows_proves_nothing(rows: int, state: str) -> None:
    """The chance that all of n rows lie below the 95th percentile is 0.95^n, which is above 2.5% up to 71 rows."""
    seconds = [0.5 + 0.001 * (i % 17) for i in range(rows)]
    sides = {side: quantile(seconds, 0.95) for side in ("tuned", "baseline")}
    card = CARD | {"latency": {"p95": sides | {"difference": between(sides["tuned"], sides["baseline"])}}}
    found = Condition.read("latency.p95 <= 2.0").judge(card)
    assert found["state"] == state, found["why"]
    assert ("it takes 72" in found["why"]) == (state == "not_proven")
    assert Condition.read("latency.p95.value <= 2.0").judge(card)["met"]  # whoever asks for the figure gets it
    assert Condition.read("latency.p95 <= 0.1").judge(card)["state"] == "broken"
    assert Condition.read("latency.p95.rise <= 0.5").judge(card)["state"] == state
    assert Condition.read("latency.p95.drop <= 0.5").judge(card)["state"] == state


def test_an_interval_that_needs_more_rows_is_no_proof() -> None:
    few = score(0.9, 0.95, 1.0) | {"needs": 1234}
    f1 = {"baseline": few, "tuned": few, "difference": score(0.1, 0.2, 0.3) | {"needs": 1234}}
    card = CARD | {"metrics": CARD["metrics"] | {"macro_f1": f1}}
    for text in ("macro_f1 >= 0.8", "macro_f1.low >= 0.8", "macro_f1.difference > 0", "macro_f1.drop <= 0.1"):
        found = Condition.read(text).judge(card)
        assert found["state"] == "not_proven" and "it takes 1,234" in found["why"], text
    assert Condition.read("macro_f1.value >= 0.9").judge(card)["met"]
    assert Condition.read("macro_f1 <= 0.8").judge(card)["state"] == "broken"
    f1["difference"]["p"] = 0.04  # it shows that there is a difference, and no more than that
    assert Condition.read("macro_f1.difference > 0").judge(card)["met"]
    assert not Condition.read("macro_f1.difference > 0.05").judge(card)["met"]
    assert spanned(few) == "0.950 [0.900, 1.000] (no proof: takes 1,234 rows)"


def test_decisions() -> None:
    assert decide(["accuracy.low >= 0.8"], CARD, True)["decision"] == "ship"
    assert decide(["accuracy.low >= 0.8", "accuracy.low >= 0.85"], CARD, True)["decision"] == "not_proven"
    assert decide(["accuracy.low >= 0.85", "forgetting.kl <= 0.01"], CARD, True)["decision"] == "hold"
    assert [c["condition"] for c in decide(None, CARD, False)["conditions"]] == [
        "goal.difference > 0", "forgetting.kl <= 0.5", "safety.refusal.drop <= 0.1",
    ]  # fmt: skip
    still = {"refusal": CARD["safety"]["refusal"] | {"difference": score(0.0, 0.0, 0.0)}}
    assert "-0" not in Condition.read("safety.refusal.drop <= 0.1").judge(CARD | {"safety": still})["why"]
    hint = Condition.read("accuracyy >= 1").judge(CARD)["why"]
    assert "did you mean accuracy?" in hint


def test_a_condition_that_is_none_is_an_error(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    said = tunesmith("check", write_recipe(tmp_path, recipe | {"gate": ["accuracy is fine"]}), "--json")
    assert said.code == 2 and "is not a condition such as accuracy.low >= 0.85" in said.json["error"]["what"]


@pytest.mark.parametrize(
    "condition, says",
    [
        ("acuracy.low >= 0.8", "no score is called 'acuracy'; did you mean 'accuracy'?"),
        ("accuracy.lwo >= 0.8", "accuracy has no 'lwo'; did you mean 'low'?"),
        ("accuracy.low.tuned >= 0.8", "accuracy has no 'low.tuned'"),
        ("goal.differences > 0", "did you mean 'difference'?"),
        ("latency.p95 <= 2.0", "latency is not measured; ask for it: evaluate: {alone: 80}"),
        ("forgetting.kl <= 0.1", "ask for it: evaluate: {forgetting: true}"),
        ("suites.arc.acc >= 0.3", "suites is not measured"),
        ("checks >= 0.5", "no score is called 'checks'"),
    ],
)
def test_a_condition_that_nothing_can_meet_is_an_error_before_anything_is_loaded(
    condition: str, says: str, tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    said = tunesmith("check", write_recipe(tmp_path, recipe | {"gate": [condition]}), "--json")
    assert said.code == 2 and says in said.json["error"]["what"], said.out


def test_conditions_on_what_is_asked_for_are_fine(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["evaluate"] |= {"alone": 2, "forgetting": True, "metrics": ["accuracy", "mine.py:checks"]}
    recipe["gate"] = ["checks.tuned.low >= 0.5", "latency.p95 <= 2.0", "forgetting.kl <= 1", "goal.drop.high <= 0.1"]
    (tmp_path / "mine.py").write_text("def checks(answer, reference, row):\n    return 1\n")
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out


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
    assert tunesmith("evaluate", path, "--set", "gate=[review.preference.low > 0.5]").code == 4  # nobody was asked yet
    said = tunesmith("evaluate", path, "--set", "gate=[weighted_f1.value >= 0]", "--json")
    assert said.code == 0 and "weighted_f1" in said.json["scorecard"]["metrics"]  # what a gate names is measured


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


def test_the_default_gate_holds_a_bad_fine_tune_and_finds_a_no_op_not_proven(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """A base that is right on three rows of four; then a rate of 0, and one label alone at a rate far too high."""

    def rows(name: str, colours: str, n: int) -> str:
        told = [{"prompt": f"Item {i}?", "completion": colours.split()[i % len(colours.split())]} for i in range(n)]
        return str(write_jsonl(tmp_path / name, told))

    test = rows("test.jsonl", "green green blue green", 24)
    recipe["data"] = {"sources": [{"path": rows("green.jsonl", "green", 60)}], "split": {"validation": 4, "test": test}}
    recipe["train"] |= {"max_steps": 60, "epochs": 10, "learning_rate": 0.005, "adapter": "full"}
    recipe["evaluate"] = {"max_new_tokens": 6}
    base = write_recipe(tmp_path, recipe | {"name": "base"}, "base.yaml")
    said = tunesmith("run", base, "--json")
    assert said.code == 0 and said.json["scorecard"]["metrics"]["accuracy"]["tuned"]["value"] == 0.75, said.out

    recipe |= {"gate": True, "model": str(tmp_path / "runs/base/package/model")}
    recipe["data"]["sources"] = [{"path": rows("red.jsonl", "red", 60)}]
    path = write_recipe(tmp_path, recipe | {"name": "noop"}, "noop.yaml")
    said = tunesmith("run", path, "--set", "train.learning_rate=0", "--set", "train.max_steps=3", "--json")
    assert said.code == 4, said.out
    gate = said.json["scorecard"]["gate"]
    assert gate["decision"] == "not_proven" and gate["conditions"][0]["condition"] == "goal.difference > 0"

    path = write_recipe(tmp_path, recipe | {"name": "bad"}, "bad.yaml")
    said = tunesmith("run", path, "--set", "train.learning_rate=1", "--json")
    assert said.code == 3, said.out
    broken = [c["condition"] for c in said.json["scorecard"]["gate"]["conditions"] if c["state"] == "broken"]
    assert {"goal.difference > 0", "constant.accuracy.difference > 0"} <= set(broken)
    assert said.json["stages"]["package"] == "missing"
