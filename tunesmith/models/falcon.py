"""Falcon's attention, which does not ask transformers' attention interface: here it asks ours where rows are packed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from tunesmith.models.attention import CannotPack, packed_attention, packing


class PackedFalcon(FalconAttention):
    """A Falcon's attention that takes packed rows."""

    def forward(
        self, hidden_states: Tensor, alibi: Tensor | None, *given: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not packing():
            plain: tuple[Tensor, Tensor | None] = super().forward(hidden_states, alibi, *given, **named)
            return plain
        if alibi is not None:
            raise CannotPack("attention with a bias by distance (ALiBi)")
        q, k, v = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
        q, k = apply_rotary_pos_emb(q, k, *named["position_embeddings"])
        if named.get("layer_past") is not None:
            k, v = named["layer_past"].update(k, v, self.layer_idx)
        out, _ = packed_attention(self, q, k, v, None)
        return self.dense(out.flatten(2)), None


def take_packs(model: nn.Module) -> bool:
    """Let a Falcon's attentions take packed rows; returns whether the model is one."""
    return _become(model, FalconAttention, PackedFalcon)


def leave_packs(model: nn.Module) -> None:
    """`take_packs` undone."""
    _become(model, PackedFalcon, FalconAttention)


def _become(model: nn.Module, old: type, new: type) -> bool:
    found = [module for module in model.modules() if type(module) is old]
    for module in found:
        module.__class__ = new
    return bool(found)
