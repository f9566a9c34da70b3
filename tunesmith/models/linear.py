"""Linear layers with or without PEFT's LoRA in them, as one step where they read the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tunesmith.models.matrices import PLAIN
from tunesmith.models.quantise import QuantLinear
from tunesmith.models.steps import Products, Whole

LINEAR = (*PLAIN, QuantLinear)


def products(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor]:
    """Several linear layers on the same x [..., in], in one step where all are plain."""
    if not all(is_plain(layer) for layer in layers):
        return [layer(x) for layer in layers]
    scales: list[float | None] = []
    wholes: list[Whole | None] = []
    given: list[Tensor | None] = []
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        wholes.append(base.whole if type(base) is QuantLinear else None)
        given += [base.weight.T if type(base) is Conv1D else base.weight, base.bias]
        if isinstance(layer, LoraLinear):
            (name,) = layer.active_adapters
            given += [layer.lora_A[name].weight, layer.lora_B[name].weight]
            scales.append(layer.scaling[name])
        else:
            given += [None, None]
            scales.append(None)
    outs: tuple[Tensor, ...] = Products.apply(x.reshape(-1, x.shape[-1]), scales, wholes, *given)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outs]


def is_plain(layer: Any) -> bool:
    """Whether `products` says all that this layer does."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if type(layer) in LINEAR:
        return True
    if type(layer) is not LoraLinear or layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return (
        type(layer.base_layer) in LINEAR
        and name in layer.lora_A
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias[name]
        and layer.fan_in_fan_out == (type(layer.base_layer) is Conv1D)
    )


def linear(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A LoRA layer's forward."""
    if args or kwargs or not is_plain(self):
        plain: Tensor = type(self).forward(self, x, *args, **kwargs)
        return plain
    return products(x, [self])[0]
