"""Parts of the test rows: every label, every column, the worst first."""

from __future__ import annotations

import numpy as np

from tunesmith.conversation.message import Conversation, Message
from tunesmith.evaluate.metrics.base import accuracy, rows
from tunesmith.evaluate.slices import columns, slices, thirds


def row(i: int, answer: str, asked: str = "What is it?", **metadata: object) -> Conversation:
    return Conversation((Message("user", asked), Message("assistant", answer)), f"test.csv:{i}", metadata)


def test_seventy_seven_labels_are_seventy_seven_slices_worst_first() -> None:
    made = [row(i, f"label {i % 77}") for i in range(77 * 6)]
    tuned = [float(i % 77 > 1) for i in range(len(made))]  # two labels were lost
    stats = {"baseline": rows([1.0] * len(made)), "tuned": rows(tuned)}
    found = slices(made, "label", accuracy, stats, 7)
    labels = [part for part in found if part["by"] == "label"]
    assert len(labels) == 77 and {part["value"] for part in labels[:2]} == {"label 0", "label 1"}
    assert all(part["n"] == 6 and part["difference"]["value"] == -1 for part in labels[:2])


def test_sources_are_slices_worst_first() -> None:
    """A row's source is its file; one of fewer than five rows is no slice."""
    asked = Message("user", "What is it?")
    names = ["a.csv"] * 6 + ["b.csv"] * 8 + ["c.csv"] * 4
    made = [Conversation((asked, Message("assistant", "x")), f"{name}:{i}") for i, name in enumerate(names, 1)]
    stats = {
        "baseline": rows([0.5] * len(made)),
        "tuned": rows([1.0 if name == "a.csv" else 0.25 for name in names]),
    }
    found = slices(made, "text", accuracy, stats, 7)
    by_source = [(p["value"], p["n"], p["difference"]["value"]) for p in found if p["by"] == "source"]
    assert by_source == [("b.csv", 8, -0.25), ("a.csv", 6, 0.5)]
    alone = slices(made[:6], "text", accuracy, {side: x[:6] for side, x in stats.items()}, 7)
    assert not any(part["by"] == "source" for part in alone)  # one source tells nothing apart


def test_every_column_tells_rows_apart() -> None:
    made = [
        row(i, "x", "long " * i, team="ab"[i % 2], urgent=i % 3 == 0, age=20 + i, rate=i / 7, level=i % 4, tags=["u"])
        for i in range(30)
    ]
    found = columns(made, "text")
    assert found["team"][:2] == ["a", "b"] and found["urgent"][:2] == ["True", "False"]
    assert found["level"] == [str(i % 4) for i in range(30)]
    for name in ("length", "age", "rate"):  # numbers: thirds
        assert [found[name].count(part) for part in dict.fromkeys(found[name])] == [10, 10, 10]
    assert found["age"][0] == f"to {np.quantile(np.arange(20, 50), 1 / 3):g}"
    assert "tags" not in found and "label" not in found
    assert thirds([None, 1.0, 2.0, 3.0], ("to {:g}", "between", "over {:g}"))[0] is None
