"""The arithmetic of norms and gates, as plain functions that torch can compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.errors import first_line


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * w over the last dimension, and 1 / sqrt(mean(x^2) + eps)."""
    wide = x.float()
    inverse = torch.linalg.vector_norm(wide, 2, -1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    # A weight wider than x (Gemma's) is multiplied before rounding, as its module does.
    return (wide * inverse).to(weight.dtype).mul_(weight).to(x.dtype), inverse


def norm_back(grad_out: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of `norm` with respect to x."""
    grad = (grad_out * weight).float()
    wide = x.float()
    along = torch.linalg.vecdot(grad, wide).unsqueeze_(-1).mul_(inverse * inverse).div_(-x.shape[-1])
    return torch.addcmul(grad, wide, along).mul_(inverse).to(x.dtype)


def gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate).mul_(up)


def gate_back(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `gate` with respect to both."""
    return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


PLAIN: dict[str, Callable[..., Any]] = {f.__name__: f for f in (norm, norm_back, gate, gate_back)}
now = dict(PLAIN)


def compile_pieces(dtype: torch.dtype, device: torch.device) -> str:
    """Put compiled functions into `now`, if each compiles and gives what the plain one does.

    Returns why they are not there, or nothing.
    """
    x, y, z = torch.randn(3, 24, 64, device=device).to(dtype)
    weight, inverse = torch.rand(64, device=device).to(dtype), torch.rand(24, 1, device=device)
    given = {"norm": (x, weight, 1e-6), "norm_back": (x, y, weight, inverse), "gate": (x, y), "gate_back": (x, y, z)}
    made = {}
    try:
        for name, plain in PLAIN.items():
            made[name] = torch.compile(plain, dynamic=True)
            torch.testing.assert_close(made[name](*given[name]), plain(*given[name]), rtol=2e-2, atol=2e-2)
    except Exception as error:  # compilers raise anything
        now.update(PLAIN)
        return first_line(error)
    now.update(made)
    return ""
