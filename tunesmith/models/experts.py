"""A mixture's experts with PEFT's LoRA on their matrices, as low-rank products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from tunesmith.models.attention import laid_out_now
from tunesmith.models.shapes import rounded
from tunesmith.models.steps import Products, gated


def experts(self: ParamWrapper, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What [T, D] a token's K experts [T, K] give it, by their weights [T, K].

    PEFT adds each expert's update to its whole matrix and keeps all of those for the backward pass; here a token meets
    its own experts' updates as low-rank products.
    """
    if not is_plain_mixture(self):
        plain: Tensor = type(self).forward(self, x_TD, top_k_index, top_k_weights)
        return plain
    low: dict[str, tuple[Sequence[Tensor], Sequence[Tensor], float]] = {}
    layer: Any = self
    while isinstance(layer, ParamWrapper):
        (name,) = layer.active_adapters
        a, b, count = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.num_experts
        b_EOR = b.view(len(b), -1, count).permute(2, 0, 1)  # as PEFT lays them out
        low[layer.parameter_name] = a.view(count, -1, a.shape[1]).unbind(), b_EOR.unbind(), layer.scaling[name]
        layer = layer.base_layer
    whole = {name: getattr(layer, name).unbind() for name in ("gate_up_proj", "down_proj")}

    def product(name: str, expert: int, x: Tensor) -> Tensor:
        a, b, scale = low.get(name, (None, None, None))
        beside = (a[expert], b[expert]) if a and b else (None, None)
        (out,) = Products.apply(x, [scale], [None], whole[name][expert], None, *beside)
        return out

    layout, choices = laid_out_now(), top_k_index.shape[1]
    order = top_k_index.flatten().argsort(stable=True)
    counts = torch.bincount(top_k_index.flatten(), minlength=layer.num_experts).tolist()
    outs = []
    for expert, x in enumerate(x_TD.index_select(0, order // choices).split(counts)):
        if count := len(x):
            x = F.pad(x, (0, 0, 0, rounded(count) - count)) if layout and layout.few else x
            gate, up = product("gate_up_proj", expert, x).chunk(2, -1)
            outs.append(product("down_proj", expert, gated(layer.act_fn, gate, up))[:count])
    y = torch.cat(outs) * top_k_weights.flatten().index_select(0, order)[:, None]
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y.index_select(0, back).unflatten(0, (-1, choices)).sum(1).to(x_TD.dtype)


def is_plain_mixture(layer: Any) -> bool:
    """Whether `experts` says all that LoRA on these experts does."""
    while isinstance(layer, ParamWrapper):
        swapped = layer._did_swap_in_out_features  # matrices are [experts, out, in]
        if layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1 or not swapped:
            return False
        layer = layer.base_layer
    return not getattr(layer, "_is_expert_parallel", False)
