"""Falcon's attention, which does not ask transformers' attention interface: here it asks ours where rows are packed."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from tunesmith.models.attention import CannotPack, packed_attention, packing


def take_packs(model: nn.Module) -> bool:
    """Let a Falcon's attentions take packed rows; returns whether the model is one."""
    found = [module for module in model.modules() if type(module) is FalconAttention]
    for module in found:
        module.forward = MethodType(_attend, module)
    return bool(found)


def leave_packs(model: nn.Module) -> None:
    """`take_packs` undone."""
    for module in model.modules():
        if getattr(module.__dict__.get("forward"), "__func__", None) is _attend:
            del module.forward


def _attend(self: Any, hidden_states: Tensor, alibi: Tensor | None, *given: Any, **named: Any) -> tuple[Tensor, Any]:
    if not packing():
        plain: tuple[Tensor, Any] = type(self).forward(self, hidden_states, alibi, *given, **named)
        return plain
    if alibi is not None:
        raise CannotPack("attention with a bias by distance (ALiBi)")
    q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    q, k = apply_rotary_pos_emb(q, k, *named["position_embeddings"])
    if named.get("layer_past") is not None:
        k, v = named["layer_past"].update(k, v, self.layer_idx)
    out, _ = packed_attention(self, q, k, v, None)
    attended: Tensor = self.dense(out.flatten(2))
    return attended, None
