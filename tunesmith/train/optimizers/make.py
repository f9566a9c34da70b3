"""The recipe's optimizer over the weights that are trained: groups by decay, rate and place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tunesmith.train.layers import depths, layer_of
from tunesmith.train.section import TrainSection

SCALES = ("ia3_", "lora_E")  # PEFT's names for vectors that it keeps as matrices of one row or column


def make(
    section: TrainSection, weights: dict[str, torch.nn.Parameter], rate_of: Callable[[str], float]
) -> torch.optim.Optimizer:
    """The optimizer, at the peak rate."""
    return section.optimizer.build(grouped(section, weights, rate_of), section.learning_rate)


def grouped(
    section: TrainSection, weights: dict[str, torch.nn.Parameter], rate_of: Callable[[str], float]
) -> list[dict[str, Any]]:
    """The weights in groups.

    Vectors and scales (norms, biases, IA3's, AdaLoRA's diagonal) are not decayed: decay pulls a product's matrix
    towards zero, but a scale towards silence. Each group's `share` is its learning rate as a multiple of the recipe's;
    `hidden` says whether it holds matrices of the decoder's layers.
    """
    heights = depths(weights)
    top = max(heights.values(), default=0)
    groups: dict[tuple[float, float, bool], list[torch.nn.Parameter]] = {}
    for name, weight in weights.items():
        matrix = weight.ndim > 1 and not any(mark in name for mark in SCALES)
        decay = section.weight_decay if matrix else 0.0
        share = rate_of(name) * section.layer_decay ** (top - heights[name])
        hidden = matrix and weight.ndim == 2 and layer_of(name) is not None
        groups.setdefault((decay, share, hidden), []).append(weight)
    return [
        {"params": group, "weight_decay": decay, "share": share, "hidden": hidden}
        for (decay, share, hidden), group in groups.items()
    ]
