"""Optimizers by name, with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tunesmith.train.section import TrainSection


def make(
    section: TrainSection, weights: dict[str, torch.nn.Parameter], rate_of: Callable[[str], float]
) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trained weights.

    Vectors (norms, biases, scales) are not decayed: decay pulls a product's matrix towards zero, but a norm's
    scale towards silence. Each group's `share` is its learning rate as a multiple of the recipe's.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, weight in weights.items():
        decay = section.weight_decay if weight.ndim > 1 else 0.0
        groups.setdefault((decay, rate_of(name)), []).append(weight)
    made = [{"params": group, "weight_decay": decay, "share": share} for (decay, share), group in groups.items()]
    if section.optimizer == "sgd":
        return torch.optim.SGD(made, lr=section.learning_rate, momentum=section.betas[0])
    if section.optimizer == "adafactor":
        return torch.optim.Adafactor(made, lr=section.learning_rate)
    return torch.optim.AdamW(made, lr=section.learning_rate, betas=section.betas, fused=True)
