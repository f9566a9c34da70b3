"""Forgetting and memory: against the full distributions, a model that learnt nothing, and planted secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import colour_rows, write_jsonl, write_recipe
from tunesmith.evaluate.forgetting import divergence
from tunesmith.evaluate.prompts import prompts


def test_the_divergence_is_a_lower_bound_that_more_tokens_close() -> None:
    from scipy.special import log_softmax
    from scipy.stats import entropy

    random = np.random.default_rng(0)
    base, tuned = (log_softmax(random.normal(0, 2, (50, 300)), axis=-1) for _ in range(2))
    full = entropy(np.exp(base), np.exp(tuned), axis=-1)
    order = np.argsort(-base, axis=-1)
    found = []
    for k in (5, 50, 300):
        taken = [np.take_along_axis(x, order[:, :k], -1) for x in (base, tuned)]
        found.append(divergence(*taken))
        assert (found[-1] <= full + 1e-6).all()
    assert (found[0] <= found[1] + 1e-9).all()
    np.testing.assert_allclose(found[2], full, atol=1e-5)
    assert divergence(base[:, :5], base[:, :5]).max() == 0


def test_prompts_are_about_two_hundred_over_six_kinds() -> None:
    kinds = [kind for kind, _ in prompts("general")]
    assert len(kinds) == len({text for _, text in prompts("general")}) == 204
    assert set(kinds) == {"knowledge", "reasoning", "instruction", "writing", "code", "refusal"}
    assert all(kinds.count(kind) == 34 for kind in set(kinds))


@pytest.fixture
def measured(recipe: dict[str, Any]) -> dict[str, Any]:
    told = [
        {"prompt": row["prompt"], "completion": f"It is {row['completion']}, as anybody can see at once, number {i}."}
        for i, row in enumerate(colour_rows())
    ]
    write_jsonl(Path(recipe["data"]["sources"][0]["path"]), told)
    recipe["data"] |= {"canaries": 2, "canary_repeats": 9}
    recipe["data"]["split"] = {"validation": 8, "test": 8}
    recipe["evaluate"] |= {"forgetting": {"prompts": 12, "max_new_tokens": 4}, "memory": {"rows": 20}}
    return recipe


def test_what_was_learnt_shows(tunesmith: Any, measured: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    measured["train"] |= {"epochs": 40, "max_steps": 60, "learning_rate": 0.03}
    path = write_recipe(tmp_path, measured)
    said = tunesmith("run", path, "--json")
    assert said.code == 0, said.out
    card = said.json["scorecard"]
    forgetting, memory = card["forgetting"], card["memory"]
    assert 0 < forgetting["kl"]["low"] <= forgetting["kl"]["value"] <= forgetting["kl"]["high"]
    assert forgetting["perplexity"]["tuned"]["value"] > forgetting["perplexity"]["baseline"]["value"]
    assert forgetting["changed"]["value"] > 0 and set(forgetting["by_kind"]) == {k for k, _ in prompts("general")}
    assert memory["exposure"]["tuned"]["value"] > memory["exposure"]["baseline"]["value"]
    assert memory["verbatim"]["baseline"]["value"] == 0 and memory["verbatim"]["n"] == 20
    assert memory["gap"]["tuned"]["low"] <= memory["gap"]["tuned"]["value"] <= memory["gap"]["tuned"]["high"]
    assert card["gate"]["decision"] in ("hold", "not_proven")  # forgetting.kl is part of the default gate

    # The reported divergence is at most the whole one, and most of it.
    base = AutoModelForCausalLM.from_pretrained(measured["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(measured["model"])
    lines = [json.loads(x) for x in (tmp_path / "runs/tiny/evaluate/forgetting.jsonl").read_text().splitlines()]
    rows = []
    for line in lines:
        asked = [{"role": "user", "content": line["prompt"]}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer((line["baseline"] or " ") + "<|im_end|>", add_special_tokens=False)["input_ids"]
        rows.append((before + after, len(before)))

    def distributions(model: Any) -> Any:
        with torch.no_grad():
            return [
                model(input_ids=torch.tensor([ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
                for ids, start in rows
            ]

    one = distributions(base)
    other = distributions(PeftModel.from_pretrained(base, tmp_path / "runs/tiny/train/adapter"))
    whole = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(one, other, strict=True)]).mean().item()
    assert 0.5 * whole < forgetting["kl"]["value"] <= whole * 1.01


def test_a_model_that_learnt_nothing_forgot_nothing(tunesmith: Any, measured: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, measured)
    said = tunesmith("run", path, "--set", "train.learning_rate=1e-30", "--set", "gate=true", "--json")
    assert said.code == 4, said.out
    card = said.json["scorecard"]
    assert card["forgetting"]["kl"]["value"] < 1e-3 and card["forgetting"]["changed"]["value"] == 0
    assert card["memory"]["exposure"]["difference"]["value"] == 0
    assert said.json["data"]["made"] == {"canaries": 18}


def test_labels_are_not_counted_as_memories() -> None:
    from tunesmith.conversation.message import Conversation, Message
    from tunesmith.evaluate.memory import Memory

    told = ["a_long_label_of_many_tokens"] * 5 + [f"a note of patient {i}" for i in range(3)]
    rows = [Conversation((Message("user", f"q{i}"), Message("assistant", text))) for i, text in enumerate(told)]
    assert sorted(row.answer for row in Memory(rows, rows, 8, 100, 7).own) == told[5:]
