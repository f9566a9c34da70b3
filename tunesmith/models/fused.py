"""Common pieces of decoders, each as one differentiable step with its backward pass written out.

A piece is recognised by what it is made of, whatever the family: a norm that has a weight and an epsilon, a
gated MLP, attention with rotary positions, linear layers with or without PEFT's LoRA in them. Before a module
gets the short way it must give what it gave before on random input; one that does not, or that holds something
unknown, keeps its own forward. Weights, names and files stay as they are.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from tunesmith.models import pieces
from tunesmith.models.attention import attention, packing, step_attention
from tunesmith.models.cuda import liger_gate, liger_norm, liger_norm_from_one
from tunesmith.models.quantise import QuantLinear

SILU = (nn.SiLU, SiLUActivation)
Whole = Callable[[Tensor, torch.dtype], Tensor]  # bits of a quantised weight -> the matrix
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the output's largest value


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


class Rotate(torch.autograd.Function):
    """Rotary positions (Su et al. 2021): each pair (x_i, x_{i + D/2}) of x [T, H, D] turned by its angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, -1.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad_outputs[0], cos, sin, 1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    y = torch.empty_like(x)
    (x1, x2), (y1, y2) = x.chunk(2, -1), y.chunk(2, -1)
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=sign)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin, value=-sign)
    return y


def products(x: Tensor, layers: Sequence[Any]) -> Sequence[Tensor]:
    """Several linear layers on the same x [..., in], in one step where all are plain."""
    if not all(_plain(layer) for layer in layers):
        return [layer(x) for layer in layers]
    scales: list[float | None] = []
    wholes: list[Whole | None] = []
    given: list[Tensor | None] = []
    for layer in layers:
        base = getattr(layer, "base_layer", layer)
        wholes.append(base.whole if type(base) is QuantLinear else None)
        if isinstance(layer, LoraLinear):
            (name,) = layer.active_adapters
            given += [base.weight, base.bias]
            given += [layer.lora_A[name].weight, layer.lora_B[name].weight]
            scales.append(layer.scaling[name])
        else:
            given += [layer.weight, layer.bias, None, None]
            scales.append(None)
    outs: tuple[Tensor, ...] = Products.apply(x.reshape(-1, x.shape[-1]), scales, wholes, *given)
    return [y.view(*x.shape[:-1], y.shape[-1]) for y in outs]


def _plain(layer: Any) -> bool:
    """Whether `products` says all that this layer does."""
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if type(layer) in (nn.Linear, QuantLinear):
        return True
    if type(layer) is not LoraLinear or layer.merged or layer.disable_adapters or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return (
        type(layer.base_layer) in (nn.Linear, QuantLinear)
        and name in layer.lora_A
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias[name]
        and not layer.fan_in_fan_out
    )


def _linear(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or not _plain(self):
        plain: Tensor = type(self).forward(self, x, *args, **kwargs)
        return plain
    return products(x, [self])[0]


def _norm(self: Any, x: Tensor) -> Tensor:
    out: Tensor = Norm.apply(x, self.weight, _epsilon(self))
    return out


def _norm_from_one(self: Any, x: Tensor) -> Tensor:
    out: Tensor = Norm.apply(x, 1 + self.weight.float(), _epsilon(self))
    return out


def _mlp(self: Any, x: Tensor) -> Tensor:
    gate, up = products(x, [self.gate_proj, self.up_proj])
    down: Tensor = self.down_proj(SwiGlu.apply(gate, up))
    return down


def _liger_mlp(self: Any, x: Tensor) -> Tensor:
    down: Tensor = self.down_proj(liger_gate(*products(x, [self.gate_proj, self.up_proj])))
    return down


def _attention(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    turn, cache, attend = kwargs.get("position_embeddings"), kwargs.get("past_key_values"), step_attention()
    if args or turn is None or not (attend or packing()) or (self.training and self.attention_dropout):
        plain: tuple[Tensor, None] = type(self).forward(self, hidden_states, *args, **kwargs)
        return plain
    q, k, v = (
        y.unflatten(-1, (-1, self.head_dim))
        for y in products(hidden_states.flatten(0, 1), [self.q_proj, self.k_proj, self.v_proj])
    )
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    if getattr(self, "use_rope", True):
        cos, sin = (t.flatten(0, 1)[:, None, : self.head_dim // 2] for t in turn)
        q, k = Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)
    if attend:
        assert cache is not None, "whoever steps keeps keys and values"
        keys, values = cache.update(k[:, :, None], v[:, :, None], self.layer_idx)
        out, _ = attend(self, q[:, :, None], keys, values, None, *self._attends_with)
    else:
        if cache is not None:  # of packed rows it only keeps what it is given
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], self.layer_idx)
        out = attention(q, k, v, *self._attends_with)
    return self.o_proj(out.reshape(*hidden_states.shape[:2], -1)), None


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


Forward = Callable[..., Any]
# The attentions whose forward `_attention` says again. Others may do more where no probe looks: by position, by a
# limit in their configuration, in training only.
ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention, SmolLM3Attention)


@cache
def _forwards(*classes: type) -> set[tuple[Any, ...]]:
    return {_code(c) for c in classes}


def _code(of: type) -> tuple[Any, ...]:
    """What a class's forward does, comparable with another's that was copied from it."""
    code = inspect.unwrap(of.forward).__code__  # type: ignore[attr-defined]
    return code.co_code, code.co_names, code.co_consts


def _shorter(module: nn.Module, liger: bool) -> tuple[str, list[Forward]]:
    """What a module is, and the ways that may say the same in fewer steps, the best first."""
    parts = {n for n, _ in module.named_children()}
    if "forward" in vars(module):  # somebody else's way already
        return "", []
    if isinstance(module, LoraLinear):
        return "LoRA layers", [_linear] if _plain(module) else []
    if not parts and {n for n, _ in module.named_parameters()} == {"weight"} and _epsilon(module):
        own = [_norm, _norm_from_one]
        return "norms", [] if isinstance(module, nn.LayerNorm) else [*LIGER_NORMS, *own] if liger else own
    if isinstance(getattr(module, "act_fn", None), SILU) and _code(type(module)) in _forwards(LlamaMLP):
        return "gated MLPs", [_liger_mlp, _mlp] if liger else [_mlp]
    if "o_proj" in parts and _code(type(module)) in _forwards(*ATTENTIONS):
        return "attentions", [_attention]
    return "", []


def fuse(model: nn.Module, run: Callable[[], object], liger: bool = False) -> Counter[str]:
    """Give modules their short way where it says the same; returns how many of each kind.

    Args:
        run: passes some rows through the model; each module's short way is held against its own forward on
            what reaches it then.
        liger: whether to try Liger's kernels first.
    """
    unfuse(model)
    held: list[tuple[nn.Module, str, list[Forward]]] = []
    reached: set[nn.Module] = set()
    for module in model.modules():
        kind, ways = _shorter(module, liger)
        if ways:
            held.append((module, kind, ways))
            module.forward = MethodType(_comparing(ways, reached), module)
    try:
        run()
    finally:
        for module, _, _ in held:
            del module.forward
    counts: Counter[str] = Counter()
    for module, kind, ways in held:
        if ways and module in reached:
            module.forward = MethodType(ways[0], module)
            counts[f"{kind} (Liger)" if ways[0] in LIGER else kind] += 1
    return counts


def unfuse(model: nn.Module) -> None:
    """Give every module its own forward back."""
    for module in model.modules():
        vars(module).pop("_attends_with", None)
        if getattr(module.__dict__.get("forward"), "__func__", None) in SHORT_WAYS:
            del module.forward


def _comparing(ways: list[Forward], reached: set[nn.Module]) -> Forward:
    """A forward that strikes from `ways` those which give something else than the module's own."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        expected = type(self).forward(self, *args, **kwargs)
        reached.add(self)
        for way in list(ways):
            try:
                same = _same(way(self, *args, **kwargs), expected)
            except (AttributeError, TypeError, ValueError, RuntimeError, LookupError, ImportError):
                same = False
            if not same:
                ways.remove(way)
        return expected

    return forward


def _same(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        found, expected = found[0], expected[0]
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    off, size, limit = (found - expected).abs(), expected.abs(), TOLERANCE.get(expected.dtype, 0.0)
    # The median too: one huge value, as trained models have them, would let everything through.
    return bool(off.max() <= limit * size.max() and off.median() <= limit * size.median())


LIGER_NORMS = [liger_norm, liger_norm_from_one]
LIGER = {*LIGER_NORMS, _liger_mlp}
SHORT_WAYS = {_linear, _norm, _norm_from_one, _mlp, _attention, *LIGER}
