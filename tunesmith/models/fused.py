"""Common pieces of decoders, each as one differentiable step with its backward pass written out.

A piece is recognised by what it is made of, whatever the family: a norm that has a weight and an epsilon, a
gated MLP, attention with rotary positions, linear layers and experts with PEFT's LoRA in them, a gelu written as a
product of powers. Before a module gets the short way it must give what it gave before on random input; one that does
not, or that holds something unknown, keeps its own forward. Weights, names and files stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation

from tunesmith.models.attention import attention, packing, step_attention
from tunesmith.models.cuda import liger_gate, liger_norm, liger_norm_from_one
from tunesmith.models.experts import experts, is_plain_mixture
from tunesmith.models.families import are_experts, attention_of, is_gated_mlp
from tunesmith.models.linear import is_plain, linear, products
from tunesmith.models.steps import SILU, Norm, Rotate, gated

SLOW_GELUS = (NewGELUActivation, FastGELUActivation)  # by tanh, as a product of powers
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of the output's largest value


def _norm(self: Any, x: Tensor) -> Tensor:
    out: Tensor = Norm.apply(x, self.weight, _epsilon(self))
    return out


def _norm_from_one(self: Any, x: Tensor) -> Tensor:
    out: Tensor = Norm.apply(x, 1 + self.weight.float(), _epsilon(self))
    return out


def _mlp(self: Any, x: Tensor) -> Tensor:
    down: Tensor = self.down_proj(gated(_act(self), *_gate_and_up(self, x)))
    return down


def _liger_mlp(self: Any, x: Tensor) -> Tensor:
    down: Tensor = self.down_proj(liger_gate(*_gate_and_up(self, x)))
    return down


def _act(mlp: Any) -> Any:
    return getattr(mlp, "act_fn", None) or mlp.activation_fn


def _gate_and_up(mlp: Any, x: Tensor) -> Sequence[Tensor]:
    if hasattr(mlp, "gate_up_proj"):
        return products(x, [mlp.gate_up_proj])[0].chunk(2, -1)
    return products(x, [mlp.gate_proj, mlp.up_proj])


def _gelu(self: Any, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _attention(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    turn, attend = kwargs.get("position_embeddings"), step_attention()
    rate = self.attention_dropout  # Falcon's is a module, and asked by ALiBi alone
    dropped = self.training and not isinstance(rate, nn.Module) and rate
    if args or turn is None or not (attend or packing()) or dropped:
        plain: tuple[Tensor, None] = type(self).forward(self, hidden_states, *args, **kwargs)
        return plain
    family = attention_of(type(self))
    assert family is not None, "it was recognised"
    q, k, v = family.read(self, hidden_states.flatten(0, 1), partial(_turned, *turn))
    cache = kwargs.get(family.cache)
    if attend:
        assert cache is not None, "whoever steps keeps keys and values"
        keys, values = cache.update(k[:, :, None], v[:, :, None], self.layer_idx)
        out, _ = attend(self, q[:, :, None], keys, values, None, *self._attends_with)
    else:
        if cache is not None:  # of packed rows it only keeps what it is given
            cache.update(k.transpose(0, 1)[None], v.transpose(0, 1)[None], self.layer_idx)
        out = attention(q, k, v, *self._attends_with)
    return getattr(self, family.last)(out.reshape(*hidden_states.shape[:2], -1)), None


def _turned(cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
    """x [T, ..., D] turned by the angles whose cos and sin are [B, T, N], the second half as the first."""
    shape = len(x), *[1] * (x.dim() - 2), -1
    cos, sin = (t.flatten(0, 1)[:, : t.shape[-1] // 2].view(shape) for t in (cos, sin))
    out: Tensor = Rotate.apply(x, cos, sin)
    return out


def _epsilon(module: Any) -> float | None:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


Forward = Callable[..., Any]


def _shorter(module: nn.Module, liger: bool) -> tuple[str, list[Forward]]:
    """What a module is, and the ways that may say the same in fewer steps, the best first."""
    parts = {n for n, _ in module.named_children()}
    if "forward" in vars(module):  # somebody else's way already
        return "", []
    if isinstance(module, LoraLinear):
        return "LoRA layers", [linear] if is_plain(module) else []
    if isinstance(module, ParamWrapper):
        known = are_experts(type(module.get_base_layer())) and is_plain_mixture(module)
        return "LoRA experts", [experts] if known else []
    if isinstance(module, SLOW_GELUS):
        return "gelus", [_gelu]
    if not parts and {n for n, _ in module.named_parameters()} == {"weight"} and _epsilon(module):
        own = [_norm, _norm_from_one]
        return "norms", [] if isinstance(module, nn.LayerNorm) else [*LIGER_NORMS, *own] if liger else own
    if is_gated_mlp(type(module)):
        return "gated MLPs", [_liger_mlp, _mlp] if liger and isinstance(_act(module), SILU) else [_mlp]
    if attention_of(type(module)):
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
    inner = {
        module.base_layer for module in model.modules() if isinstance(module, ParamWrapper)
    }  # one within the other
    for module in model.modules():
        if module in inner:
            continue
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
SHORT_WAYS = {linear, experts, _norm, _norm_from_one, _mlp, _gelu, _attention, *LIGER}
