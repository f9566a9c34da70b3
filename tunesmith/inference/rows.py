"""Rows that are answered together though they began at different times: the memory of a continuous batch.

Prompts are read apart, a piece at a time, after what an earlier prompt has in common with them (the prefix cache). A
prompt that is read joins the batch: keys and values lie in one buffer, each row from its left edge, and one forward
gives every row its next token. When a row leaves, the last one takes its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from tunesmith.inference.slots import common
from tunesmith.models.attention import CannotPack, refuse_extras
from tunesmith.models.packed import REFUSALS

ATTENTION = "tunesmith_rows"
ROOM = 256  # tokens that rows have room for at first
WORTH = 8  # tokens: a shorter common beginning is not worth a copy


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
    q = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.matmul(q, key.transpose(2, 3)).masked_fill_(hidden, -torch.inf)
    out = torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), value)
    return out.flatten(1, 2)[:, None], None


class _Reading(DynamicLayer):
    """One prompt's keys and values [1, G, P, D], of which the first are filled."""

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


class _Held(DynamicLayer):
    """All rows' keys and values [slots, G, room, D]."""

    def __init__(self, like: _Reading, slots: int, rows: Rows) -> None:
        super().__init__()
        self.keys = like.keys.new_empty(slots, like.keys.shape[1], ROOM, like.keys.shape[3])
        self.values = like.values.new_empty(slots, like.values.shape[1], ROOM, like.values.shape[3])
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
            new = old.new_empty(old.shape[0], old.shape[1], room, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)


class Prompt:
    """A prompt that is being read. `cached` of its tokens were there already."""

    def __init__(self, ids: Sequence[int], adapter: str | None, cache: Any, cached: int) -> None:
        self.ids, self.adapter, self.cache = list(ids), adapter, cache
        self.read = self.cached = cached

    @property
    def whole(self) -> bool:
        return self.read == len(self.ids)


class Rows:
    """A continuous batch of a causal language model that takes its attention from transformers' interface.

    Args:
        slots: rows at once.
        prefix_bytes: what the keys and values of earlier prompts may take.

    Raises:
        CannotPack: the model can't be run like this, or gives other scores.
    """

    def __init__(self, model: Any, slots: int, prefix_bytes: int, probe: Sequence[int], tolerance: float) -> None:
        self.model, self.slots = model, slots
        self.device = next(model.parameters()).device
        self._backbone = getattr(model, model.base_model_prefix)
        self._layers = model.config.get_text_config().num_hidden_layers
        self._held: list[_Held] = []
        self._lengths: list[int] = []
        self._prefixes: list[Prompt] = []  # the most recent last
        self._prefix_bytes, self.token_bytes = prefix_bytes, 0
        self.places: tuple[Tensor, int, int] = (torch.empty(0), 0, 0)
        AttentionInterface.register(ATTENTION, rows_attention)
        self._check(list(probe), tolerance)

    def begin(self, ids: Sequence[int], adapter: str | None) -> Prompt:
        """A prompt that is to be read, with what is there of it already."""
        best, shared = None, 0
        for known in self._prefixes:
            if known.adapter == adapter:
                alike = min(common(known.ids, ids), len(ids) - 1)
                best, shared = (known, alike) if alike > max(shared, WORTH) else (best, shared)
        starts: list[Any] = [None] * self._layers
        if best:
            self._prefixes.append(self._prefixes.pop(self._prefixes.index(best)))
            starts = [(la.keys[:, :, :shared], la.values[:, :, :shared]) for la in best.cache.layers]
        layers = [_Reading(len(ids), start) for start in starts]
        return Prompt(ids, adapter, Cache(layers=layers), shared if best else 0)

    def read(self, prompt: Prompt, count: int) -> Tensor:
        """Read up to `count` more tokens; the last one's logits [V]."""
        ids = torch.tensor([prompt.ids[prompt.read : prompt.read + count]], device=self.device)
        positions = torch.arange(prompt.read, prompt.read + ids.shape[1], device=self.device)[None]
        with self._attending(positions):
            out = self._backbone(
                input_ids=ids, position_ids=positions, past_key_values=prompt.cache, use_cache=True
            ).last_hidden_state
        prompt.read += ids.shape[1]
        logits: Tensor = self.model.get_output_embeddings()(out[0, -1:])
        return logits[0]

    def join(self, prompt: Prompt) -> None:
        """Make a prompt that was read the batch's last row, and remember it for prompts that begin alike."""
        row, length = len(self._lengths), len(prompt.ids)
        if not self._held:
            self._held = [_Held(layer, self.slots, self) for layer in prompt.cache.layers]
        self._room(length + 1)
        for held, layer in zip(self._held, prompt.cache.layers, strict=True):
            held.keys[row, :, :length], held.values[row, :, :length] = layer.keys[0], layer.values[0]
        self._lengths.append(length)
        covered = [p for p in self._prefixes if p.adapter == prompt.adapter and p.ids == prompt.ids[: len(p.ids)]]
        self._prefixes = [p for p in self._prefixes if p not in covered] + [prompt]
        while sum(len(p.ids) for p in self._prefixes) * self.token_bytes > self._prefix_bytes:
            self._prefixes.pop(0)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Every row's next logits [B, V], after these tokens."""
        longest = max(self._lengths) + 1
        self._room(longest)
        at_B = torch.tensor(self._lengths, device=self.device)
        self.places = (at_B, len(self._lengths), longest)
        ids_B1 = torch.tensor(tokens, device=self.device)[:, None]
        with self._attending(at_B[:, None]):
            hidden = self._backbone(
                input_ids=ids_B1, position_ids=at_B[:, None], past_key_values=Cache(layers=self._held), use_cache=True
            ).last_hidden_state[:, 0]
        self._lengths = [length + 1 for length in self._lengths]
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    def leave(self, row: int) -> None:
        """Let a row go; the last one gets its number."""
        last = self._lengths.pop()
        if row < len(self._lengths):
            for held in self._held:
                end = len(self._lengths)
                held.keys[row, :, :last] = held.keys[end, :, :last].clone()
                held.values[row, :, :last] = held.values[end, :, :last].clone()
            self._lengths[row] = last

    def forget(self, adapter: str | None) -> None:
        """Drop what was read with an adapter."""
        self._prefixes = [p for p in self._prefixes if p.adapter != adapter]

    def hidden(self, ids: Sequence[int]) -> Tensor:
        """The last layer's outputs [T, D] over a text."""
        prompt = self.begin(ids, None)
        prompt.cache, prompt.read = Cache(layers=[_Reading(len(ids)) for _ in range(self._layers)]), 0
        positions = torch.arange(len(ids), device=self.device)[None]
        with self._attending(positions):
            found: Tensor = self._backbone(
                input_ids=torch.tensor([list(ids)], device=self.device),
                position_ids=positions,
                past_key_values=prompt.cache,
            ).last_hidden_state[0]
        return found

    def _room(self, tokens: int) -> None:
        room = self._held[0].keys.shape[2]
        if tokens > room:
            for held in self._held:
                held.grow(max(tokens, 2 * room))

    @contextlib.contextmanager
    def _attending(self, positions_BT: Tensor) -> Iterator[None]:
        token = _places.set(_Places(positions_BT))
        try:
            yield
        finally:
            _places.reset(token)

    @torch.inference_mode()
    def _check(self, probe: list[int], tolerance: float) -> None:
        """Read two prompts of different lengths in pieces, step twice, and hold the scores against plain readings."""
        plain = self.model.config._attn_implementation
        texts = [probe, (probe * 2)[3 : len(probe) + 8]]
        try:
            expected = [self.model(input_ids=torch.tensor([t], device=self.device)).logits[0, -1] for t in texts]
            self.model.set_attn_implementation(ATTENTION)
            for text in texts:
                prompt = self.begin(text[:-2], None)
                while not prompt.whole:
                    self.read(prompt, 5)
                self.token_bytes = sum(x[0, :, 0].nbytes for la in prompt.cache.layers for x in (la.keys, la.values))
                self.join(prompt)
            self.step([text[-2] for text in texts])
            found = self.step([text[-1] for text in texts])
            off = max(
                (a.float().log_softmax(-1) - b.float().log_softmax(-1)).abs().max().item()
                for a, b in zip(found, expected, strict=True)
            )
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            self.model.set_attn_implementation(plain)
            raise CannotPack(str(error)) from error
        self._lengths, self._prefixes = [], []
        if not off <= 10 * tolerance:
            self.model.set_attn_implementation(plain)
            raise CannotPack(f"scores of next tokens are off by {off:.2g}")


class Apart:
    """The same for any causal language model: rows are stepped one after another, each with a cache of its own."""

    def __init__(self, model: Any, virtual: Sequence[int] = ()) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self._rows: list[Any] = []

    def begin(self, ids: Sequence[int], adapter: str | None) -> Prompt:
        return Prompt(ids, adapter, None, 0)

    def read(self, prompt: Prompt, count: int) -> Tensor:
        # At once: not every architecture goes on with a text in the middle.
        logits, prompt.cache = self._forward(prompt.ids, None)
        prompt.read = len(prompt.ids)
        return logits

    def join(self, prompt: Prompt) -> None:
        self._rows.append(prompt.cache)

    def step(self, tokens: Sequence[int]) -> Tensor:
        found = []
        for row, token in enumerate(tokens):
            logits, self._rows[row] = self._forward([token], self._rows[row])
            found.append(logits)
        return torch.stack(found)

    def leave(self, row: int) -> None:
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last

    def forget(self, adapter: str | None) -> None:
        pass

    def hidden(self, ids: Sequence[int]) -> Tensor:
        out = self.model(input_ids=torch.tensor([list(ids)], device=self.device), output_hidden_states=True)
        found: Tensor = out.hidden_states[-1][0]
        return found

    def _forward(self, ids: Sequence[int], cache: Any) -> tuple[Tensor, Any]:
        out = self.model(input_ids=torch.tensor([list(ids)], device=self.device), past_key_values=cache, use_cache=True)
        return out.logits[0, -1], out.past_key_values
