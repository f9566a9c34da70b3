"""Several optimizers as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Together(torch.optim.Optimizer):
    """Optimizers that each have weights of their own; their groups and states are seen as one's."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        for part in parts:
            part.param_groups = [g for g in self.param_groups if any(g is own for own in part.param_groups)]
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """A step of each."""
        for part in self.parts:
            part.step()
