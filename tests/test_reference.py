"""Log-probabilities from before training: the model's own, kept for the next run on it, and for no other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranked import in_pair
from tests.test_methods import models  # noqa: F401 (a fixture)
from tunesmith.conversation.render import Rendered
from tunesmith.models.packed import PackedForward
from tunesmith.train.objectives.method import Example
from tunesmith.train.reference import with_reference


def test_the_reference_is_kept_and_a_damaged_one_made_again(models: Any, monkeypatch: Any, tmp_path: Path) -> None:  # noqa: F811
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    example = Example("r", (Rendered([5, 6, 7], [0.0, 1.0, 1.0]),))
    forward = PackedForward(copy.deepcopy(models[0]), [example.sequences[0]])
    (first,) = with_reference([example], forward, "m", 64)
    monkeypatch.setattr("tunesmith.train.reference._computed", lambda *a: pytest.fail("computed again"))
    assert with_reference([example], forward, "m", 64)[0].reference == first.reference
    monkeypatch.undo()
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    (kept,) = (tmp_path / "reference").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    assert with_reference([example], forward, "m", 64)[0].reference == first.reference


def test_two_ranks_share_the_reference_and_one_finds_it(models: Any, monkeypatch: Any, tmp_path: Path) -> None:  # noqa: F811
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    rows = [Rendered(list(range(5, 8 + n)), [0.0] + [1.0] * (2 + n)) for n in range(5)]
    examples = [Example(f"r{n}", (row,)) for n, row in enumerate(rows)]
    forward = PackedForward(copy.deepcopy(models[0]), rows)
    pairs = in_pair(lambda ranks: with_reference(examples, forward, "m", 64, ranks))
    monkeypatch.setattr("tunesmith.train.reference._computed", lambda *a: pytest.fail("computed again"))
    alone = with_reference(examples, forward, "m", 64)
    assert pairs[0] == pairs[1] == alone and len(list((tmp_path / "reference").iterdir())) == 1
    for example, row in zip(alone, rows, strict=True):
        logits = models[0](torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(row.ids[1:])[:, None]).sum().item()
        assert example.reference == (pytest.approx(expected, abs=1e-3),)


def test_the_reference_of_another_model_or_row_is_not_taken(models: Any, monkeypatch: Any, tmp_path: Path) -> None:  # noqa: F811
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    forwards = [PackedForward(copy.deepcopy(model), [Rendered([5, 6, 7], [0.0, 1.0, 1.0])]) for model in models]

    def reference(model: int, ids: list[int], weights: list[float]) -> float:
        (found,) = with_reference([Example("r", (Rendered(ids, weights),))], forwards[model], f"m{model}", 64)
        return found.reference[0]

    rows = [([5, 6, 7], [0.0, 1.0, 1.0]), ([5, 6, 8], [0.0, 1.0, 1.0]), ([5, 6, 7], [0.0, 0.0, 1.0])]
    found = {(model, number): reference(model, *row) for model in (0, 1) for number, row in enumerate(rows)}
    assert len(set(found.values())) == 6 == len(list((tmp_path / "reference").iterdir()))
    for (model, number), value in found.items():
        assert reference(model, *rows[number]) == value
        ids, weights = torch.tensor([rows[number][0]]), torch.tensor(rows[number][1])[1:]
        with torch.no_grad():
            log_p = models[model](ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert value == pytest.approx((log_p * weights).sum().item(), rel=1e-4)
