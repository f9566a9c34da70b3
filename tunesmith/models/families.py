"""How families of decoders write attention with rotary positions and gated MLPs, as far as they differ."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.phi.modeling_phi import PhiAttention
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from tunesmith.models.falcon import PackedFalcon
from tunesmith.models.linear import products

Turn = Callable[[Tensor], Tensor]
Read = tuple[Tensor, Tensor, Tensor]


def _apart(self: Any, x_TD: Tensor, turn: Turn) -> Read:
    """q, k and v by a product each."""
    layers = [self.q_proj, self.k_proj, self.v_proj]
    q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in products(x_TD, layers))
    for norm in ("norm", "layernorm"):
        if hasattr(self, f"q_{norm}"):
            q, k = getattr(self, f"q_{norm}")(q), getattr(self, f"k_{norm}")(k)
    return (turn(q), turn(k), v) if getattr(self, "use_rope", True) else (q, k, v)


def _one_after_another(self: Any, x_TD: Tensor, turn: Turn) -> Read:
    """One product: the heads of all queries, then of keys, then of values."""
    y, groups = products(x_TD, [self.qkv_proj])[0].unflatten(-1, (-1, self.head_dim)), self.num_key_value_heads
    looking, v = y.split((y.shape[1] - groups, groups), 1)
    q, k = turn(looking).split((y.shape[1] - 2 * groups, groups), 1)
    return q, k, v


def _by_group(self: Any, x_TD: Tensor, turn: Turn) -> Read:
    """One product: of each key's group the heads of its queries, the key, the value."""
    groups = getattr(self, "num_kv_heads", None) or self.config.num_attention_heads
    width = getattr(self, "head_dim", None) or self.head_size
    y = products(x_TD, [self.query_key_value])[0].unflatten(-1, (groups, -1, width))
    looking, v = y.split((y.shape[2] - 1, 1), 2)
    q, k = turn(looking).split((y.shape[2] - 2, 1), 2)
    return q.flatten(1, 2), k.squeeze(2), v.squeeze(2)


class Attention(NamedTuple):
    """An attention with rotary positions.

    Attributes:
        read: its queries [T, H, D], keys and values [T, G, D] of x [T, D]; what positions turn goes through `turn`.
        last: the name of its last product.
        cache: what it calls the keys and values that are kept.
    """

    read: Callable[[Any, Tensor, Turn], Read]
    last: str = "o_proj"
    cache: str = "past_key_values"


# Only forwards that are known word for word: others may do more where no probe looks (by position, by a limit in their
# configuration, in training only).
ATTENTIONS = {
    **dict.fromkeys(
        (LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention, SmolLM3Attention), Attention(_apart)
    ),
    PhiAttention: Attention(_apart, "dense"),
    Phi3Attention: Attention(_one_after_another),
    GPTNeoXAttention: Attention(_by_group, "dense", "layer_past"),
    PackedFalcon: Attention(_by_group, "dense", "layer_past"),
}


def attention_of(kind: type) -> Attention | None:
    """How this class says attention, if it is known."""
    return _attentions().get(_code(kind))


def is_gated_mlp(kind: type) -> bool:
    """Whether this class is down(act(gate(x)) * up(x)) and no more."""
    return _code(kind) in _codes(LlamaMLP, Phi3MLP)


def are_experts(kind: type) -> bool:
    """Whether this class's experts are gated MLPs, their matrices [experts, out, in]."""
    return _code(kind) in _codes(MixtralExperts)


@cache
def _attentions() -> dict[tuple[Any, ...], Attention]:
    return {_code(kind): told for kind, told in ATTENTIONS.items()}


@cache
def _codes(*kinds: type) -> set[tuple[Any, ...]]:
    return {_code(kind) for kind in kinds}


def _code(of: type) -> tuple[Any, ...]:
    """What a class's forward does, comparable with another's that was copied from it."""
    code = getattr(inspect.unwrap(of.forward), "__code__", None)  # type: ignore[attr-defined]
    return (code.co_code, code.co_names, code.co_consts) if code else (of,)
