"""Torch's FSDP2: each decoder layer's weights are parted among the ranks and gathered while it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tunesmith.train.objectives.method import Batch, Loss
from tunesmith.train.parallel.alone import Alone, Step, Weights, parted_norms, trained
from tunesmith.train.ranks import Ranks


class Sharded(Alone):
    """Every rank holds a part of each weight, of its gradient and of its optimizer state."""

    whole_here = False

    def __init__(self, ranks: Ranks, step: Step, weights: Weights, reshard: bool) -> None:
        super().__init__(ranks, step, weights)
        layers = set(getattr(step.packed.model, "_no_split_modules", None) or ())
        for module in list(step.modules()):
            if type(module).__name__ in layers:
                fully_shard(module, reshard_after_forward=reshard)
        self.run: Any = fully_shard(step)  # what is left: embeddings, the last norm, the output layer
        for module in step.modules():
            if isinstance(module, FSDPModule):  # a loss is divided by the whole step's size already
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        self.weights = trained(self.model)

    def __call__(self, batch: Batch, last: bool = False) -> Loss:
        self.run.set_requires_gradient_sync(last)
        return super().__call__(batch, last)

    def clip(self, limit: float) -> float:
        norm = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), limit)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def norms(self) -> Tensor:
        return parted_norms([p.to_local() if isinstance(p, DTensor) else p for p in self.weights.values()])

    def gathered(self, tensor: Tensor) -> Tensor:
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()

    def part(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
            return whole
        # Every rank has read the whole one: nothing is sent.
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(whole.to(parameter.device), mesh, placements, src_data_rank=None)

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """On the first rank, every weight is whole while the block runs; the others only send their parts."""
        self._give_back()
        swapped: list[tuple[nn.Module, str, Any]] = []
        seen: dict[int, nn.Parameter] = {}  # tied weights stay tied
        with torch.no_grad():
            for module in self.model.modules():
                for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                    if isinstance(parameter, DTensor):
                        if id(parameter) not in seen:
                            full = parameter.full_tensor().cpu() if self.ranks.main else self._send(parameter)
                            seen[id(parameter)] = nn.Parameter(full, parameter.requires_grad)
                        swapped.append((module, name, parameter))
        if self.ranks.main:
            for module, name, parameter in swapped:
                module._parameters[name] = seen[id(parameter)]
        try:
            yield self.model
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self._give_back()
        return super().state()

    def _give_back(self) -> None:
        """Keep only this rank's parts; a forward pass without a backward pass leaves gathered weights behind."""
        for module in self.step.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _send(self, parameter: DTensor) -> Tensor:
        parameter.full_tensor()
        return torch.empty(0)
