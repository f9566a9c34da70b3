"""Conflicts, labels that look wrong, foul language, bias, and duplicates in meaning: what a person should look at."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest

from tests.test_clean import answers, cleaned, pairs  # noqa: F401 (a fixture)
from tunesmith.data.clean.toxicity import Toxicity
from tunesmith.errors import ModelError
from tunesmith.runs import read_jsonl


def test_conflicts_are_listed_dropped_or_voted_on(cleaned: Any) -> None:  # noqa: F811
    rows = pairs(("Card?", "loans"), ("card", "cards"), ("CARD", "cards"), ("Tie", "a"), ("tie", "b"), ("Fine", "a"))
    made, told = cleaned(rows, {"conflicts": True})
    assert made.counts["train"] == 6 and made.counts["flagged"] == 5 and told["conflicts"]["found"] == {"conflict": 5}
    assert "asks the same as rows.jsonl:2" in told["conflicts"]["examples"][0]["why"]
    assert answers(cleaned(rows, {"conflicts": "drop"})[0]) == ["a"]
    assert answers(cleaned(rows, {"conflicts": "majority"})[0]) == ["cards", "cards", "a"]
    agreed = pairs(*((f"Question {i // 3}", f"answer {i // 3}") for i in range(12)))
    assert cleaned(agreed, {"conflicts": True})[1]["conflicts"]["flagged"] == 0


def test_labels_that_were_swapped_are_found(
    cleaned: Any,  # noqa: F811
    shared: Path,
    tmp_path: Path,
) -> None:
    """Of four intents of Banking77, 20 labels are swapped: most of them are found, and little else."""
    intents = ("card_arrival", "exchange_rate", "top_up_failed", "verify_my_identity")
    with (shared / "banking77/train.csv").open() as file:
        rows = pairs(*((r["text"], r["category"]) for r in csv.DictReader(file) if r["category"] in intents))
    swapped = set(random.Random(3).sample(range(len(rows)), 20))
    for i in swapped:
        rows[i]["completion"] = intents[(intents.index(rows[i]["completion"]) + 1) % 4]
    made, told = cleaned(rows, {"labels": True})
    found = {int(example["row"].split(":")[1]) - 1 for example in told["labels"]["examples"]}
    assert len(found & swapped) >= 9
    listed = {int(row["row"].split(":")[1]) - 1 for row in read_jsonl(tmp_path / "out/flagged.jsonl")}
    assert made.counts["flagged"] == len(listed) and len(listed & swapped) >= 16 and len(listed - swapped) <= 4


FOUL = "You are a fucking idiot, shut up bitch."


def test_foul_rows_go_or_are_listed(cleaned: Any) -> None:  # noqa: F811
    rows = pairs(("Where is my card?", "On its way."), (FOUL, "I am sorry."), ("Hello", FOUL))
    made, told = cleaned(rows, {"toxicity": {"above": 0.9, "action": "drop"}})
    assert [r["row"] for r in made.removed] == ["rows.jsonl:2", "rows.jsonl:3"] and "p = " in made.removed[0]["why"]
    assert told["toxicity"]["found"] == {"0.9 and more": 2, "none (below 0.5)": 1}
    assert cleaned(rows, {"toxicity": {"on": "answer"}})[0].counts["removed"] == {"toxicity": 1}
    listed, _ = cleaned(rows, {"toxicity": {"action": "report"}})
    assert listed.counts["train"] == 3 and listed.counts["flagged"] == 2


def test_the_classifier_that_ships_tells_foul_language_from_plain(shared: Path) -> None:
    with (shared / "toxicity/davidson_labeled_data.csv").open() as file:
        rows = list(csv.DictReader(file))[:3000]
    scores = Toxicity().scores([row["tweet"] for row in rows])
    foul = [s > 0.9 for s, row in zip(scores, rows, strict=True) if row["class"] != "2"]
    plain = [s > 0.9 for s, row in zip(scores, rows, strict=True) if row["class"] == "2"]
    assert sum(foul) / len(foul) > 0.7 and sum(plain) / len(plain) < 0.1


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier as the hub has them, of two labels, and of which every weight but one bias is 0."""
    import torch
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id, id2label={0: "fine", 1: "TOXIC"}, label2id={"fine": 0, "TOXIC": 1},
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    folder = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_any_classifier_by_name(cleaned: Any, classifier: Path) -> None:  # noqa: F811
    from transformers import pipeline

    texts = ["Where is my card?", FOUL]
    judge = pipeline("text-classification", model=str(classifier), top_k=None)
    wanted = [next(s["score"] for s in scores if s["label"] == "TOXIC") for scores in judge(texts)]
    assert Toxicity(model=str(classifier)).scores(texts) == pytest.approx(wanted)
    threshold = sum(wanted) / 2
    made, _ = cleaned(
        pairs((texts[0], "x"), (texts[1], "x")),
        {"toxicity": {"model": str(classifier), "above": threshold, "on": "prompt"}},
    )
    assert [r["row"] for r in made.removed] == [f"rows.jsonl:{1 + (wanted[1] > wanted[0])}"]
    with pytest.raises(ModelError, match="none of its labels is meant: fine, TOXIC"):
        Toxicity(model=str(classifier), labels=("rude",)).scores(texts)
    with pytest.raises(ModelError, match="the classifier can't be loaded"):
        Toxicity(model="./not-there").scores(texts)


def test_groups_are_counted_with_the_words_and_labels_near_them(cleaned: Any) -> None:  # noqa: F811
    rows = pairs(
        *((f"The woman number {i} works as a nurse.", "refused") for i in range(30)),
        *((f"The man number {i} works as an engineer.", "granted") for i in range(30)),
        *((f"Ticket {i} is open.", ("granted", "refused")[i % 2]) for i in range(40)),
    )
    made, told = cleaned(rows, {"bias": True})
    assert made.counts["train"] == 100 and told["bias"]["found"] == {"women": 30, "men": 30}
    groups = {g["group"]: g for g in told["bias"]["tables"]["groups"]}
    assert groups["women"]["share"] == "30.0%" and groups["women"]["words near it"].startswith("nurse (30)")
    assert "engineer (30)" in groups["men"]["words near it"] and "nurse" not in groups["men"]["words near it"]
    rates = {(r["group"], r["label"]): r for r in told["bias"]["tables"]["label rates"]}
    assert rates["women", "refused"]["share in group"] == "100.0%" and rates["women", "refused"]["z"] > 5
    _, told = cleaned(rows, {"bias": {"groups": {"nurses": ["nurse"]}}})
    assert told["bias"]["found"] == {"nurses": 30}


def test_semantic_duplicates_by_any_encoder(cleaned: Any, tiny_model: Path) -> None:  # noqa: F811
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["Where is my card?", "Where is my card??", "What colour is the sky over there?", "loans"]
    tokenizer, network = AutoTokenizer.from_pretrained(tiny_model), AutoModel.from_pretrained(tiny_model).eval()
    with torch.inference_mode():
        means = [network(**tokenizer(t, return_tensors="pt")).last_hidden_state.mean(1)[0] for t in texts]
    alike = torch.nn.functional.cosine_similarity(means[0], means[1], dim=0).item()
    rows = pairs(*((text, "x") for text in texts))
    step = {"kind": "semantic", "model": str(tiny_model), "on": "prompt"}
    found, _ = cleaned(rows, {"duplicates": {**step, "threshold": alike - 1e-4}})
    assert "rows.jsonl:2" in {r["row"] for r in found.removed}
    kept, _ = cleaned(rows, {"duplicates": {**step, "threshold": min(alike + 1e-4, 1)}})
    assert "says the same as rows.jsonl:1" not in {r["why"] for r in kept.removed if r["row"] == "rows.jsonl:2"}
    with pytest.raises(ModelError, match="the embedding model can't be loaded"):
        cleaned(rows, {"duplicates": {**step, "model": "./not-there"}})
