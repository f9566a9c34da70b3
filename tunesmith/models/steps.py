"""Steps that decoders are made of, each with its backward pass written out so that it keeps and computes little."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from tunesmith.models import pieces

SILU = (nn.SiLU, SiLUActivation)
Whole = Callable[[Tensor, torch.dtype], Tensor]  # bits of a quantised weight -> the matrix


class Products(torch.autograd.Function):
    """y_i [T, out_i] = x [T, in] W_i^T + b_i + s_i (x A_i^T) B_i^T for several W_i that read the same x.

    The low-rank products share theirs with x; the gradients with respect to x are added where they are made. A
    quantised W_i is kept as its bits, and made whole for each product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: Sequence[float | None], wholes: Sequence[Whole | None], *layers: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights, biases, a, b = (list(layers[i::4]) for i in range(4))
        low_a = torch.cat([m.to(x.dtype) for m in a if m is not None]) if any(s is not None for s in scales) else None
        xa = x @ low_a.T if low_a is not None else None
        low_b, outs, at = [], [], 0
        for weight, whole, bias, up, scale in zip(weights, wholes, biases, b, scales, strict=True):
            matrix: Any = weight if whole is None else whole(weight, x.dtype)  # type: ignore[arg-type]
            if up is not None and scale is not None and xa is not None:
                low_b.append(up.to(x.dtype))
                # The small summand first: added to a result that is already rounded, it would vanish in bfloat16.
                y = (xa[:, at : at + up.shape[1]] @ low_b[-1].T).mul_(scale).addmm_(x, matrix.T)
                y = y if bias is None else y.add_(bias)
                at += up.shape[1]
            else:
                y = F.linear(x, matrix, bias)
            outs.append(y)
        ctx.scales, ctx.wholes, ctx.count = scales, wholes, len(weights)
        ctx.master = next((m.dtype for m in a if m is not None), None)
        ctx.save_for_backward(x, low_a, xa, *weights, *low_b)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low_a, xa, *rest = ctx.saved_tensors
        weights, low_b = rest[: ctx.count], iter(rest[ctx.count :])
        through: list[Tensor] = []
        given: list[Any] = [None, None, None]
        at = 0
        for number, (grad, scale) in enumerate(zip(grads, ctx.scales, strict=True)):
            wanted = ctx.needs_input_grad[3 + 4 * number :]
            grad_b = None
            if scale is not None:
                up = next(low_b)
                through.append((grad @ up).mul_(scale))
                grad_b = (grad.T @ xa[:, at : at + up.shape[1]]).to(ctx.master).mul_(scale)
                at += up.shape[1]
            given += [grad.T @ x if wanted[0] else None, grad.sum(0) if wanted[1] else None, None, grad_b]
        if through:
            beside = torch.cat(through, 1) if len(through) > 1 else through[0]
            grads_a = iter((beside.T @ x).to(ctx.master).split([t.shape[1] for t in through]))
            for number, scale in enumerate(ctx.scales):
                given[5 + 4 * number] = None if scale is None else next(grads_a)
        if ctx.needs_input_grad[0]:
            given[0] = beside @ low_a if through else None
            for grad, weight, whole in zip(grads, weights, ctx.wholes, strict=True):
                matrix = weight if whole is None else whole(weight, grad.dtype)
                given[0] = grad @ matrix if given[0] is None else given[0].addmm_(grad, matrix)
        return tuple(given)


class Norm(torch.autograd.Function):
    """y = x / sqrt(mean(x^2) + eps) * w over the last dimension (Zhang and Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out: Tensor
        out, inverse = pieces.now["norm"](x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = (grad_outputs[0] * x.float() * inverse).flatten(0, -2).sum(0).to(weight.dtype)
        return pieces.now["norm_back"](grad_outputs[0], x, weight, inverse), grad_w, None


class SwiGlu(torch.autograd.Function):
    """y = silu(gate) * up (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = pieces.now["gate"](gate, up)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        grads: tuple[Tensor, Tensor] = pieces.now["gate_back"](grad_outputs[0], *ctx.saved_tensors)
        return grads


def gated(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up. silu's is not kept but computed again; gelu's takes longer to compute than it is worth."""
    out: Tensor = SwiGlu.apply(gate, up) if isinstance(act, SILU) else act(gate) * up
    return out


class Rotate(torch.autograd.Function):
    """Rotary positions (Su et al. 2021): of x [T, ..., D], each pair (x_i, x_{i + N/2}) among the first N turned by its
    angle, whose cos and sin are [T, ..., N/2]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, -1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_outputs[0], cos, sin, 1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    y, half = torch.empty_like(x), cos.shape[-1]
    (x1, x2, rest), (y1, y2, kept) = (z.tensor_split((half, 2 * half), -1) for z in (x, y))
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=-sign)
    kept.copy_(rest)
    return y
