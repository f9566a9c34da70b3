"""A LoRA layer as one differentiable step.

PEFT writes y = W x + s B A x as five operations, two of which touch a tensor of the output's size again.
Here the update is added where the product already lies, forward and backward. Weights, names and files stay
PEFT's; layers with dropout, DoRA or several adapters keep PEFT's own forward.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor


class LoraProduct(torch.autograd.Function):
    """y [T, out] = x [T, in] W^T + b + s (x A^T) B^T, with W and b frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        a_low, b_low = a.to(x.dtype), b.to(x.dtype)
        xa = x @ a_low.T
        y = torch.nn.functional.linear(x, weight, bias)
        y.addmm_(xa, b_low.T, alpha=scale)
        ctx.save_for_backward(x, weight, a_low, b_low, xa)
        ctx.scale, ctx.master = scale, a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, xa = ctx.saved_tensors
        grad = grad_outputs[0]
        through = (grad @ b) * ctx.scale
        grad_a = (through.T @ x).to(ctx.master) if ctx.needs_input_grad[3] else None
        grad_b = (grad.T @ xa).to(ctx.master) * ctx.scale if ctx.needs_input_grad[4] else None
        grad_x = (grad @ weight).addmm_(through, a) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_a, grad_b, None


def _forward(self: LoraLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if self.disable_adapters or self.merged or args or kwargs:
        return type(self).forward(self, x, *args, **kwargs)
    name = self.active_adapters[0]
    base = self.base_layer
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = LoraProduct.apply(
        flat, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def fuse(model: torch.nn.Module) -> int:
    """Give every plain LoRA layer the one-step forward; returns how many there were."""
    count = 0
    for module in model.modules():
        if type(module) is LoraLinear and _plain(module):
            module.forward = MethodType(_forward, module)
            count += 1
    return count


def _plain(module: LoraLinear) -> bool:
    names = list(module.active_adapters)
    return (
        len(names) == 1
        and type(module.base_layer) is torch.nn.Linear
        and not module.base_layer.weight.requires_grad
        and isinstance(module.lora_dropout[names[0]], torch.nn.Identity)
        and not module.lora_variant
        and not module.lora_bias[names[0]]
        and not module.fan_in_fan_out
    )
