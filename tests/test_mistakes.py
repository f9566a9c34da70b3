"""Misses by kind and by what rows are about, those that tuning made worse first; doubtful labels."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.evaluate.mistakes import mistakes

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
