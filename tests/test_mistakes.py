"""Misses by kind and by what rows are about, those that tuning made worse first; doubtful labels."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from tests.conftest import colour_rows, write_jsonl
from tests.fake_endpoint import FakeEndpoint
from tunesmith.evaluate.mistakes import mistakes
from tunesmith.runs import read_jsonl

TOPICS = {
    "cards": "My card was lost, the card is blocked and I need a card",
    "loans": "The loan has a rate of interest and the loan is long",
    "travel": "My flight to Rome and the hotel in Rome were booked",
}


def line(i: int, topic: str, tuned: str, baseline: str = "?", nll: float = 0.1) -> dict[str, Any]:
    def side(answer: str) -> dict[str, Any]:
        return {"answer": answer, "score": float(answer == topic), "nll": nll, "tokens": 1}

    told = {"prompt": [{"role": "user", "content": f"{TOPICS[topic]}, {i}"}], "reference": topic, "id": f"r{i}"}
    return told | {"baseline": side(baseline), "tuned": side(tuned)}


def test_clusters_show_where_the_misses_are() -> None:
    lines = [line(i, ("cards", "loans", "travel")[i % 3], ("cards", "loans", "cards")[i % 3]) for i in range(60)]
    lines[2] = line(2, "travel", "loans", "travel")  # the baseline had it
    lines[3] = line(3, "cards", "loans", nll=5.0)  # perhaps the label is wrong
    found = mistakes(lines, "label", True, 7)
    assert found["misses"] == 21 and found["worse"] == {"n": 1, "rows": ["r2"]}
    kinds = {kind["name"]: kind for kind in found["kinds"]}
    assert kinds["travel taken for cards"]["n"] == 19 and found["kinds"][0]["n"] == 19
    assert found["suspects"] == ["r3"]
    travel = [part for part in found["clusters"] if "rome" in part["about"]]
    assert sum(part["misses"] for part in travel) == 20 and all(part["share"]["value"] == 1 for part in travel)
    assert found["clusters"][0]["share"]["value"] == 1
    assert next(part["rows"][0] for part in travel if "r2" in part["rows"]) == "r2"
    assert found == mistakes(lines, "label", True, 7)  # the same seed, the same clusters


@pytest.mark.parametrize("higher", [True, False])
def test_texts_miss_where_the_baseline_did_better(higher: bool) -> None:
    lines = []
    for i in range(30):
        one, other = ((0.6, 0.3) if i % 3 == 0 else (0.3, 0.6))[:: 1 if higher else -1]
        told = line(i, "loans", "some other words")
        lines.append(told | {"baseline": told["baseline"] | {"score": one}, "tuned": told["tuned"] | {"score": other}})
    found = mistakes(lines, "text", higher, 7)
    assert found["misses"] == found["worse"]["n"] == 10 and found["kinds"] == [
        {"name": "much longer", "n": 10, "rows": ["r0", "r3", "r6"]}
    ]
    assert mistakes(lines[:3], "text", higher, 7)["clusters"] == []  # too few to group


def test_clusters_are_of_embeddings_where_there_are_some() -> None:
    """Rows of the same words in two groups that only their embeddings tell apart, on one large common direction."""
    random = np.random.default_rng(3)
    lines = [line(i, "cards", "cards" if i % 2 else "loans") for i in range(60)]
    vectors = random.normal(0, 0.1, (60, 16)) + np.eye(16)[0] * 40
    vectors[::2] += np.eye(16)[1] * 2  # the rows that are missed
    found = mistakes(lines, "label", True, 7, ("base", vectors.astype(np.float16)))
    assert found["embedding"] == "base"
    assert {part["share"]["value"] for part in found["clusters"]} == {1.0}
    assert sum(part["misses"] for part in found["clusters"]) == 30
    by_words = mistakes(lines, "label", True, 7)
    assert by_words["embedding"] is None and by_words["clusters"] == []  # every row has the same words


def test_the_model_at_hand_embeds_and_an_endpoint_does_not(
    tunesmith: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of the last states, as transformers gives them; asked once. Between endpoints words must do."""
    data = write_jsonl(tmp_path / "test.jsonl", rows := colour_rows(24))
    with FakeEndpoint(lambda messages: "mauve") as there:
        call = [
            "evaluate",
            "--model",
            f"{there.url}#big",
            "--data",
            data,
            "--set",
            "evaluate.max_new_tokens=3",
            "--json",
        ]
        said = tunesmith(*call, "--against", tiny_model)
        assert said.code in (0, 3, 4), said.out
        assert (
            said.json["errors"]["embedding"] == str(tiny_model) or said.json["errors"]["embedding"] == tiny_model.name
        )
        report = (tmp_path / "evaluation/report.html").read_text()
        assert "last states" in report and "TF-IDF" not in report
        (kept,) = (tmp_path / "evaluation/answers").glob("model-*.jsonl")
        found = [row["found"]["embedding"] for row in read_jsonl(kept) if "embedding" in row["found"]]
        vectors = np.stack([np.frombuffer(base64.b64decode(bits), np.float16) for bits in found])
        model = AutoModel.from_pretrained(tiny_model)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        for row, vector in list(zip(rows, vectors, strict=True))[:5]:
            ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                expected = model(ids).last_hidden_state[0].mean(0).numpy()
            assert vector == pytest.approx(expected, abs=5e-3)
        monkeypatch.setattr("tunesmith.inference.subject.Local.embedded", None)  # nothing is asked again
        assert tunesmith(*call, "--against", tiny_model, "--set", "evaluate.bootstrap=300").code in (0, 3, 4)
        said = tunesmith(*call, "--against", f"{there.url}#other", "--out", "b")
        assert said.json["errors"]["embedding"] is None
        assert "TF-IDF" in next(tmp_path.glob("b/**/report.html")).read_text()
