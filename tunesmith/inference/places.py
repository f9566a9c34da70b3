"""Where a continuous batch keeps its keys and values, and the attention that reads them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

from tunesmith.inference.decode import one_token
from tunesmith.models.attention import refuse_extras

ATTENTION = "tunesmith_rows"
ROOM = 256  # tokens that rows have room for at first


class Placed(Protocol):
    """What says where a step's new tokens go: each row's place [B], how many rows there are, the longest's length."""

    places: tuple[Tensor, int, int]


@dataclass
class _Places:
    """Where a forward's new tokens lie [B, T], and what each of them may not see, made once for all layers."""

    positions_BT: Tensor
    _seen: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def seen(self, keys: int, window: int | None) -> tuple[Tensor, Tensor]:
        """[B, 1, T, S], True where a key is seen; and the opposite."""
        if (keys, window) not in self._seen:
            at = torch.arange(keys, device=self.positions_BT.device)
            now = self.positions_BT[:, None, :, None]
            found = at <= now
            found = found if window is None else found & (at > now - window)
            self._seen[keys, window] = found, ~found
        return self._seen[keys, window]


_places: ContextVar[_Places] = ContextVar("where the forward's tokens lie")


def rows_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [B, H, T, D], key and value [B, G, S, D] -> [B, T, H, D]; T is 1 where B is more."""
    refuse_extras(others)
    seen, hidden = _places.get().seen(key.shape[2], sliding_window)
    if query.shape[2] > 1:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None
    return one_token(query, key, value, scaling, lambda scores: scores.masked_fill_(hidden, -torch.inf)), None


class Reading(DynamicLayer):
    """One prompt's keys and values [1, G, P, D], of which the first `filled` are there."""

    keys: Any
    values: Any

    def __init__(self, length: int, start: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.length, self.filled, self.start = length, 0, start
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self.keys = key_states.new_empty(*key_states.shape[:2], self.length, key_states.shape[3])
            self.values = value_states.new_empty(*value_states.shape[:2], self.length, value_states.shape[3])
            if self.start:
                self.filled = self.start[0].shape[2]
                self.keys[:, :, : self.filled], self.values[:, :, : self.filled] = self.start
                self.start = None
        end = self.filled + key_states.shape[2]
        self.keys[:, :, self.filled : end], self.values[:, :, self.filled : end] = key_states, value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.filled


class Held(DynamicLayer):
    """All rows' keys and values [slots, G, room, D]."""

    def __init__(self, like: Reading, slots: int, rows: Placed) -> None:
        super().__init__()
        # Zeros: what no row sees is multiplied by 0, and must be a number for that.
        self.keys = like.keys.new_zeros(slots, like.keys.shape[1], ROOM, like.keys.shape[3])
        self.values = like.values.new_zeros(slots, like.values.shape[1], ROOM, like.values.shape[3])
        self.rows, self.is_initialized = rows, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        at_B, count, longest = self.rows.places
        which_B = torch.arange(count, device=at_B.device)
        self.keys[which_B, :, at_B], self.values[which_B, :, at_B] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[:count, :, :longest], self.values[:count, :, :longest]

    def get_seq_length(self) -> int:
        return self.rows.places[2]

    def grow(self, room: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(old.shape[0], old.shape[1], room, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


@contextlib.contextmanager
def attending(positions_BT: Tensor) -> Iterator[None]:
    """Forwards inside are of tokens at these places."""
    token = _places.set(_Places(positions_BT))
    try:
        yield
    finally:
        _places.reset(token)


AttentionInterface.register(ATTENTION, rows_attention)
