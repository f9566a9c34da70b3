"""An optimizer's state as tensors and JSON, so that a checkpoint can hold any optimizer's exactly.

State that is neither tensor nor number goes through the optimizer's own `pack(state)` and `unpack(weight, packed)`.
"""

from __future__ import annotations

from typing import Any

import torch

Weights = dict[str, torch.nn.Parameter]


def packed(optimizer: torch.optim.Optimizer, weights: Weights) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by `what/weight's name`, and the numbers: of each weight, and of each group (such as step counts)."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    pack = getattr(optimizer, "pack", dict)
    seen: set[int] = set()
    for name, weight in weights.items():
        for what, value in pack(optimizer.state.get(weight, {})).items():
            if isinstance(value, torch.Tensor):
                value = value.detach().contiguous()
                shared = value.data_ptr() in seen  # a table that all weights share: a file holds no tensor twice
                tensors[f"{what}/{name}"] = value.clone() if shared else value
                seen.add(value.data_ptr())
            else:
                numbers.setdefault(name, {})[what] = value
    groups = [{k: v for k, v in g.items() if isinstance(v, bool | int | float)} for g in optimizer.param_groups]
    return tensors, {"numbers": numbers, "groups": groups}


def unpack(
    optimizer: torch.optim.Optimizer, weights: Weights, tensors: dict[str, torch.Tensor], facts: dict[str, Any]
) -> None:
    """Give the optimizer the state that `packed` took."""
    states: dict[str, dict[str, Any]] = {name: dict(facts["numbers"].get(name, {})) for name in weights}
    for key, value in tensors.items():
        what, _, name = key.partition("/")
        states[name][what] = value
    for name, weight in weights.items():
        state = {k: _there(optimizer, weight, k, v) for k, v in states[name].items()}
        if state:
            optimizer.state[weight] = optimizer.unpack(weight, state) if hasattr(optimizer, "unpack") else state
    for group, saved in zip(optimizer.param_groups, facts["groups"], strict=True):
        group.update(saved)


def _there(optimizer: torch.optim.Optimizer, weight: torch.nn.Parameter, what: str, value: Any) -> Any:
    """A piece of state on the weight's device; in memory that pages, where the optimizer's does."""
    if not isinstance(value, torch.Tensor):
        return value
    if getattr(optimizer, "is_paged", False) and what.startswith("state"):
        return optimizer.get_state_buffer(weight, dtype=value.dtype).copy_(value)  # type: ignore[attr-defined]
    # A step count lives where the optimizer put it: fused AdamW keeps it beside the weight.
    return value.to(weight.device)
