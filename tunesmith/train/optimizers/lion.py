"""Lion: the sign of an averaged gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """w <- w - rate (sign(b1 m + (1 - b1) g) + decay w), then m <- b2 m + (1 - b2) g.

    Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every weight that has a gradient."""
        for group in self.param_groups:
            weights = [w for w in group["params"] if w.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight]["average"] = torch.zeros_like(weight)
            averages = [self.state[w]["average"] for w in weights]
            gradients = [w.grad for w in weights]
            first, second = group["betas"]
            steps = torch._foreach_lerp(averages, gradients, 1 - first)
            torch._foreach_sign_(steps)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, steps, alpha=-group["lr"])
            torch._foreach_lerp_(averages, gradients, 1 - second)
