"""BERTScore (Zhang et al. 2020): words matched by how alike a model finds them in their contexts.

The model: TUNESMITH_BERTSCORE, a folder or hub id; roberta-large and its 17th layer if that is not set.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np

from tunesmith.errors import ModelError, first_line
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, mean, rows

DEFAULT, DEFAULT_LAYER = "roberta-large", 17


@cache
def _encoder(name: str, layer: int | None) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, model = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise ModelError(
            f"BERTScore's encoder can't be loaded ({first_line(error)})",
            where=name,
            fix="Set TUNESMITH_BERTSCORE to a folder or hub id of an encoder that can be reached.",
        ) from error
    layers = model.encoder.layer if hasattr(model, "encoder") else None
    if layer is not None and layers is not None and layer < len(layers):
        model.encoder.layer = layers[:layer]
    return tokenizer, model


def scores(given: list[str], references: list[str], name: str, layer: int | None = None) -> Floats:
    """F1 [n] of each pair: the mean best cosine between tokens, both ways; no idf, no rescaling."""
    import torch

    tokenizer, model = _encoder(name, layer)

    @torch.inference_mode()
    def embedded(text: str) -> tuple[Any, Any]:
        ids = tokenizer(
            text.strip(), return_tensors="pt", truncation=True, max_length=512, return_special_tokens_mask=True
        )
        words = ids.pop("special_tokens_mask")[0] == 0
        ids.pop("token_type_ids", None)
        return torch.nn.functional.normalize(model(**ids).last_hidden_state[0], dim=-1), words

    found = []
    for one, other in zip(given, references, strict=True):
        if not one.strip() or not other.strip():
            found.append(0.0)
            continue
        (x, words_x), (y, words_y) = embedded(one), embedded(other)
        alike = x @ y.T  # the model's own marks may be matched, but have no say
        precision = alike.max(1).values[words_x].mean().item()
        recall = alike.max(0).values[words_y].mean().item()
        found.append(2 * precision * recall / (precision + recall) if precision + recall else 0.0)
    return np.asarray(found)


def _stats(answers: Answers) -> Floats:
    name = os.environ.get("TUNESMITH_BERTSCORE")
    layer = None if name else DEFAULT_LAYER
    return rows(list(scores(list(answers.given), list(answers.references), name or DEFAULT, layer)))


bertscore = Metric("bertscore", _stats, mean)
