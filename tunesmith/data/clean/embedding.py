"""Semantic duplicates: texts whose embeddings point the same way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.data.groups import Groups
from tunesmith.errors import ModelError, first_line
from tunesmith.progress import bar

BATCH = 32
BLOCK = 2048
LONGEST = 512


def joined(texts: Sequence[str], beside: Sequence[str], model: str, threshold: float) -> Groups:
    """Texts joined where the cosine of their embeddings reaches the threshold, directly or through others, and what
    stands beside them is the same."""
    _, others = np.unique(np.array(beside), return_inverse=True)
    vectors = embedded(texts, model)
    groups = Groups(len(texts))
    for start in range(0, len(vectors), BLOCK):
        alike = vectors[start : start + BLOCK] @ vectors.T >= threshold
        alike &= others[start : start + BLOCK, None] == others
        for i, j in np.argwhere(np.triu(alike, start + 1)).tolist():
            groups.join(start + i, j)
    return groups


def embedded(texts: Sequence[str], model: str) -> np.ndarray:
    """Unit vectors, shape (texts, width): the mean of the model's last states over a text's tokens, as
    sentence-transformers pools by default (Reimers and Gurevych 2019)."""
    import torch

    tokenizer, network = _loaded(model)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Any] = [None] * len(texts)
    with bar("Embedding texts", len(texts)) as progress, torch.inference_mode():
        for start in range(0, len(order), BATCH):
            which = order[start : start + BATCH]
            batch = tokenizer(
                [texts[i] or " " for i in which],
                padding=True,
                truncation=True,
                max_length=min(LONGEST, tokenizer.model_max_length),
                return_tensors="pt",
            )
            states = network(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1).float()
            pooled = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            for i, vector in zip(which, torch.nn.functional.normalize(pooled, dim=-1).numpy(), strict=True):
                found[i] = vector
            progress.advance(len(which))
    return np.stack(found) if found else np.zeros((0, 1), dtype=np.float32)


def _loaded(model: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the embedding model can't be loaded ({first_line(error)})",
            where="data.clean.duplicates.model",
            fix="Name a folder or a hub model with an encoder, such as sentence-transformers/all-MiniLM-L6-v2.",
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, network
