"""The recipe's optimizer over the weights that are trained: groups by decay, rate and place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tunesmith.train.layers import depths, layer_of
from tunesmith.train.section import TrainSection


def make(
    section: TrainSection, weights: dict[str, torch.nn.Parameter], rate_of: Callable[[str], float]
) -> torch.optim.Optimizer:
    """The optimizer, at the peak rate."""
    return section.optimizer.build(grouped(section, weights, rate_of), section.learning_rate)


def grouped(
    section: TrainSection, weights: dict[str, torch.nn.Parameter], rate_of: Callable[[str], float]
) -> list[dict[str, Any]]:
    """The weights in groups.

    Vectors and scales (norms, biases, IA3's) are not decayed: decay pulls a product's matrix towards zero, but a
    scale towards silence. Each group's `share` is its learning rate as a multiple of the recipe's; `hidden`
    says whether it holds matrices of the decoder's layers.
    """
    heights = depths(weights)
    top = max(heights.values(), default=0)
    groups: dict[tuple[float, float, bool], list[torch.nn.Parameter]] = {}
    for name, weight in weights.items():
        decay = 0.0 if weight.ndim < 2 or "ia3_" in name else section.weight_decay
        share = rate_of(name) * section.layer_decay ** (top - heights[name])
        hidden = weight.ndim == 2 and layer_of(name) is not None
        groups.setdefault((decay, share, hidden), []).append(weight)
    return [
        {"params": group, "weight_decay": decay, "share": share, "hidden": hidden}
        for (decay, share, hidden), group in groups.items()
    ]
