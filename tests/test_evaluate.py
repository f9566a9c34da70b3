"""Scores equal the reference libraries', verdicts follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_recipe
from tunesmith import plugins
from tunesmith.evaluate.metrics import Answers, Metric
from tunesmith.evaluate.statistics import verdict
from tunesmith.models.machine import machine


def answers(given: list[str], references: list[str]) -> Answers:
    return Answers(given, references, [1.0] * len(given), [2] * len(given))


def named(name: str) -> Metric:
    return plugins.load("metric", name)  # type: ignore[no-any-return]


def value(metric: Metric, these: Answers) -> float:
    return float(metric.value(metric.stats(these).sum(0)))


TEXTS = ["the cat sat on the mat", "a dog barked", "", "nothing alike", "die Katze saß"]
RIGHT = ["the cat is on the mat", "a dog barked loudly", "something", "zebra", "die Katze schlief"]


def test_text_scores_equal_sacrebleu_and_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    these = answers(TEXTS, RIGHT)
    assert value(named("chrf"), these) == pytest.approx(CHRF().corpus_score(TEXTS, [RIGHT]).score)
    scorer = RougeScorer(["rougeL"])
    expected = np.mean([scorer.score(r, g)["rougeL"].fmeasure for g, r in zip(TEXTS, RIGHT, strict=True)])
    assert value(named("rouge_l"), these) == pytest.approx(expected)


def test_label_scores_equal_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, f1_score

    random = np.random.default_rng(0)
    right = [str(x) for x in random.choice(["a", "b", "c"], 200, p=[0.6, 0.3, 0.1])]
    given = [str(x) for x in random.choice(["a", "b", "c", "none of them"], 200)]
    these = answers(given, right)
    assert value(named("accuracy"), these) == pytest.approx(accuracy_score(right, given))
    expected = f1_score(right, given, average="macro", labels=["a", "b", "c"])
    assert value(named("macro_f1"), these) == pytest.approx(expected)


def test_json_scores() -> None:
    right = ['{"a": 1, "b": {"c": "x"}}'] * 5
    given = [
        '{"b":{"c":"x"},"a":1.0}',
        '{"a": 2, "b": {"c": "x"}}',
        "not json",
        '{"a": 1}',
        '{"a":1,"b":{"c":"x"},"d":0}',
    ]
    these = answers(given, right)
    assert value(named("exact_match"), these) == pytest.approx(1 / 5)
    assert value(named("json_valid"), these) == pytest.approx(4 / 5)
    hits, wrong, missed = 2 + 1 + 0 + 1 + 2, 0 + 1 + 0 + 0 + 1, 0 + 1 + 2 + 1 + 0
    assert value(named("json_field_f1"), these) == pytest.approx(2 * hits / (2 * hits + wrong + missed))


def test_likelihoods() -> None:
    these = Answers(["x", "y"], ["x", "y"], [2.0, 4.0], [1, 3])
    assert value(named("loss"), these) == pytest.approx(1.5)
    assert value(named("perplexity"), these) == pytest.approx(np.exp(1.5))


def test_the_verdict_follows_the_interval_and_the_metrics_direction() -> None:
    up, down, unclear = ({"low": a, "high": b} for a, b in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1)))
    assert [verdict(named("accuracy"), g) for g in (up, down, unclear)] == ["better", "worse", "not_proven"]
    assert [verdict(named("loss"), g) for g in (up, down, unclear)] == ["worse", "better", "not_proven"]


def test_evaluation_end_to_end(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """The scorecard's shape, both models' answers kept, and likelihoods equal to plain transformers'."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe["train"] |= {"max_steps": 20, "epochs": 10}
    said = tunesmith("run", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out
    card = json.loads((tmp_path / "runs/tiny/scorecard.json").read_text())
    assert card["goal_metric"] == "accuracy" and card["n"] == 8
    assert set(card["metrics"]) == {"accuracy", "macro_f1", "loss", "perplexity"}
    for scores in card["metrics"].values():
        assert {"value", "low", "high"} <= set(scores["baseline"]) & set(scores["tuned"])
        assert {"value", "low", "high", "p"} <= set(scores["difference"])
        assert scores["tuned"]["low"] <= scores["tuned"]["value"] <= scores["tuned"]["high"]
    lines = [json.loads(x) for x in (tmp_path / "runs/tiny/evaluate/answers.jsonl").read_text().splitlines()]
    assert len(lines) == 8

    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    base = AutoModelForCausalLM.from_pretrained(recipe["model"], dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, tmp_path / "runs/tiny/train/adapter")
    near = 1e-3 if machine().precision == "float32" else 1e-2
    for line in lines:
        prompt = tokenizer.apply_chat_template(line["prompt"], add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(line["reference"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * len(before) + after])
        with torch.no_grad():
            loss = tuned(input_ids=torch.tensor([before + after]), labels=labels).loss
            free = tuned.generate(
                input_ids=torch.tensor([before]), attention_mask=torch.ones(1, len(before), dtype=torch.long),
                max_new_tokens=4, do_sample=False,
            )[0, len(before) :]  # fmt: skip
        assert line["tuned"]["tokens"] == len(after)
        assert line["tuned"]["nll"] == pytest.approx(loss.item() * len(after), rel=near)
        assert line["tuned"]["answer"] == tokenizer.decode(free, skip_special_tokens=True)
