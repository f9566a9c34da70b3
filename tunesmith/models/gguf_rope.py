"""Rotary positions, as GGUF keeps them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import ModelError


def add_rope(writer: Any, config: dict[str, Any], head_dim: int, folder: Path) -> None:
    """Write how positions turn queries and keys.

    Raises:
        ModelError: a kind that is not known here.
    """
    import gguf

    told = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    base = float(told.get("rope_theta") or config.get("rope_theta") or 10_000.0)
    kind = told.get("rope_type") or told.get("type") or "default"
    writer.add_rope_freq_base(base)
    writer.add_rope_dimension_count(head_dim)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(told["factor"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3(told, base, head_dim))
    elif kind != "default":
        raise ModelError(
            f"no GGUF file can be written of a model with rope_type {kind}",
            where=str(folder),
            fix="Known: default, linear, llama3. Serve others with engine: transformers.",
        )


def _llama3(told: dict[str, Any], base: float, head_dim: int) -> np.ndarray[Any, Any]:
    """What each frequency is divided by (Llama 3.1: Grattafiori et al. 2024, arXiv:2407.21783)."""
    factor, old = told["factor"], told["original_max_position_embeddings"]
    low, high = told["low_freq_factor"], told["high_freq_factor"]
    lengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    smooth = np.clip((old / lengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
