"""What the data stage's manifest tells of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import write_jsonl
from tunesmith.data.tokens import packed


def test_tokens_are_those_of_the_renderer(prepared: Any, renderer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "word " * (1 + 7 * i % 60), "completion": "yes " * (1 + i % 5)} for i in range(80)]
    made = prepared(str(write_jsonl(tmp_path / "a.jsonl", rows)), split={"validation": 8, "test": 8}, max_length=512)
    for part in ("train", "validation", "test"):
        rendered = [renderer.render(row) for row in made.parts[part]]
        told = made.told["tokens"][part]
        lengths = np.array([len(r) for r in rendered])
        assert told["total"] == lengths.sum() and told["trained"] == sum(r.trained for r in rendered)
        assert told["trained share"] == pytest.approx(told["trained"] / told["total"], abs=1e-4)
        assert (told["shortest"], told["longest"]) == (lengths.min(), lengths.max())
        assert told["median"] == np.quantile(lengths, 0.5, method="nearest")
        assert sum(told["histogram"].values()) == len(lengths)
        assert told["histogram"]["64"] == ((lengths > 32) & (lengths <= 64)).sum()
        assert told["padded"] == pytest.approx(lengths.sum() / (len(lengths) * lengths.max()), abs=1e-4)
        assert told["padded"] < told["packed"] <= 1


def test_repeated_and_weighed_rows_are_counted(prepared: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}] * 3))
    once, twice = prepared(path), prepared({"path": path, "weight": 2})
    assert twice.told["tokens"]["train"]["total"] == 2 * once.told["tokens"]["train"]["total"]


def test_packing_is_trls() -> None:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    random = np.random.default_rng(0)
    for spread in (5, 60, 128):
        lengths = random.integers(1, spread + 1, 500).tolist()
        rows = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in lengths]})
        theirs = trl.pack_dataset(rows, seq_length=128, strategy="bfd")
        assert len(packed(lengths, 128)) == len(theirs)


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60))
def test_packing_keeps_every_row_and_never_overflows(lengths: list[int]) -> None:
    sequences = packed(lengths, 50)
    assert sorted(n for s in sequences for n in s) == sorted(lengths)
    assert all(sum(s) <= 50 for s in sequences)
    assert sum(sum(s) <= 25 for s in sequences) <= 1  # two half-empty ones would have been one
