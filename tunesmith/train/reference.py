"""Log-probabilities that the model had before training: computed once, kept on disk for the next run on the same model
and rows. The model in memory is the one that will be trained, before anything is put into it, so there is never a
second one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tunesmith.models.packed import PackedForward
from tunesmith.models.packs import packs
from tunesmith.models.resolve import cache_folder
from tunesmith.progress import bar
from tunesmith.runs import hash_json
from tunesmith.train.objectives.method import Example, log_probs
from tunesmith.train.ranks import Ranks


def with_reference(
    examples: Sequence[Example], forward: PackedForward, model: str, capacity: int, ranks: Ranks | None = None
) -> list[Example]:
    """The examples with what `forward` gives their sequences.

    Args:
        model: what identifies the weights and their precision.
        capacity: tokens in one forward pass.
        ranks: each of which computes a share; the first one keeps the whole, so that any number of ranks finds it.
    """
    ranks = ranks or Ranks()
    if not examples:
        return []
    sequences = [example.sequences + example.beside for example in examples]
    key = hash_json({"model": model, "rows": [[(s.ids, s.weights) for s in row] for row in sequences]})
    kept = cache_folder() / "reference" / f"{key[:32]}.npy"
    found = ranks.from_main(lambda: _read(kept, sum(map(len, sequences))))
    if found is None:
        shares = ranks.share(range(len(examples)), lambda i: examples[i].tokens)
        every = ranks.all(_computed([sequences[i] for i in shares[ranks.rank]], forward, capacity))
        values = dict(zip(itertools.chain(*shares), itertools.chain(*every), strict=True))
        found = np.array([value for i in range(len(examples)) for value in values[i]])
        if ranks.main:
            _write(kept, found)
    parts = iter(found.tolist())
    return [
        replace(example, reference=tuple(next(parts) for _ in row))
        for example, row in zip(examples, sequences, strict=True)
    ]


@torch.no_grad()
def _computed(sequences: Sequence[Sequence[object]], forward: PackedForward, capacity: int) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in sequences]
    if not sequences:
        return found
    with bar("Reference", len(sequences)) as progress:
        for group in packs(range(len(sequences)), sequences, capacity):  # type: ignore[arg-type]
            rows = [s for i in group for s in sequences[i]]
            values = iter(log_probs(forward, forward.pack(rows, [len(sequences[i]) for i in group])))  # type: ignore[arg-type]
            for i in group:
                found[i] = [next(values).double().sum().item() for _ in sequences[i]]
            progress.advance(len(group))
    return found


def _read(path: Path, count: int) -> np.ndarray | None:
    try:
        found: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == (count,) else None


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    with temporary.open("wb") as file:
        np.save(file, values, allow_pickle=False)
    temporary.replace(path)
