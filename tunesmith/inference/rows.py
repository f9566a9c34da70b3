"""Rows that are answered together though they began at different times: the memory of a continuous batch.

Prompts are read apart, a piece at a time, after what an earlier prompt has in common with them (the prefix cache). A
prompt that is read joins the batch: keys and values lie in one buffer, each row from its left edge, and one forward
gives every row its next token. When a row leaves, the last one takes its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tunesmith.inference.places import ATTENTION, Held, Reading, attending
from tunesmith.inference.slots import common
from tunesmith.models.attention import CannotPack
from tunesmith.models.packed import REFUSALS
from tunesmith.models.shapes import few_shapes, rounded, rounded_rows

SPARE = 64  # tokens by which a piece of a prompt is made longer at most
SCORED = 64  # places of a text whose scores of all tokens are in memory at once
WORTH = 8  # tokens: a shorter common beginning is not worth a copy


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
        self._few = few_shapes(self.device, next(model.parameters()).dtype)
        self._held: list[Held] = []
        self._lengths: list[int] = []
        self._prefixes: list[Prompt] = []  # the most recent last
        self._prefix_bytes, self.token_bytes = prefix_bytes, 0
        self.places: tuple[Tensor, int, int] = (torch.empty(0), 0, 0)
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
        layers = [Reading(len(ids) + SPARE * self._few, start) for start in starts]
        return Prompt(ids, adapter, Cache(layers=layers), shared if best else 0)

    def read(self, prompt: Prompt, count: int) -> Tensor:
        """Read up to `count` more tokens; the last one's logits [V]."""
        some = prompt.ids[prompt.read : prompt.read + count]
        spare = min(self._spare(len(some)), SPARE)  # at the right, where nobody sees them
        ids = torch.tensor([some + [0] * spare], device=self.device)
        positions = torch.arange(prompt.read, prompt.read + ids.shape[1], device=self.device)[None]
        positions = positions.clamp_max(len(prompt.ids) - 1)
        with attending(positions):
            out = self._backbone(
                input_ids=ids, position_ids=positions, past_key_values=prompt.cache, use_cache=True
            ).last_hidden_state
        prompt.read += len(some)
        for layer in prompt.cache.layers:
            layer.filled = prompt.read
        logits: Tensor = self.model.get_output_embeddings()(out[0, len(some) - 1 : len(some)])
        return logits[0]

    def join(self, prompt: Prompt) -> None:
        """Make a prompt that was read the batch's last row, and remember it for prompts that begin alike."""
        row, length = len(self._lengths), len(prompt.ids)
        if not self._held:
            self._held = [Held(layer, self.padded(self.slots), self) for layer in prompt.cache.layers]
        self._room(length + 1)
        for held, layer in zip(self._held, prompt.cache.layers, strict=True):
            held.keys[row, :, :length] = layer.keys[0, :, :length]
            held.values[row, :, :length] = layer.values[0, :, :length]
        self._lengths.append(length)
        covered = [p for p in self._prefixes if p.adapter == prompt.adapter and p.ids == prompt.ids[: len(p.ids)]]
        self._prefixes = [p for p in self._prefixes if p not in covered] + [prompt]
        while sum(len(p.ids) for p in self._prefixes) * self.token_bytes > self._prefix_bytes:
            self._prefixes.pop(0)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Every row's next logits [B, V], after these tokens."""
        count, longest = len(self._lengths), max(self._lengths) + 1
        spare = [0] * (self.padded(count) - count)  # rows that nobody is in
        longest += self._spare(longest)
        self._room(longest)
        at_B = torch.tensor(self._lengths + spare, device=self.device)
        self.places = (at_B, len(at_B), longest)
        ids_B1 = torch.tensor([*tokens, *spare], device=self.device)[:, None]
        with attending(at_B[:, None]):
            hidden = self._backbone(
                input_ids=ids_B1, position_ids=at_B[:, None], past_key_values=Cache(layers=self._held), use_cache=True
            ).last_hidden_state[:, 0]
        self._lengths = [length + 1 for length in self._lengths]
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits[:count]

    def padded(self, rows: int) -> int:
        """How many rows a step of so many computes."""
        return rounded_rows(rows) if self._few else rows

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
        prompt.cache, prompt.read = Cache(layers=[Reading(len(ids)) for _ in range(self._layers)]), 0
        positions = torch.arange(len(ids), device=self.device)[None]
        with attending(positions):
            found: Tensor = self._backbone(
                input_ids=torch.tensor([list(ids)], device=self.device),
                position_ids=positions,
                past_key_values=prompt.cache,
            ).last_hidden_state[0]
        return found

    def scores(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The logits at each place of a text, some places at a time [N, V]."""
        head = self.model.get_output_embeddings()
        for some in self.hidden(ids).split(SCORED):
            yield head(some)

    def _spare(self, tokens: int) -> int:
        """How many more are computed, so that few sizes come."""
        return rounded(tokens) - tokens if self._few else 0

    def _room(self, tokens: int) -> None:
        room = self._held[0].keys.shape[2]
        if tokens > room:
            for held in self._held:
                held.grow(max(tokens, 2 * room))

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

    def __init__(self, model: Any, slots: int) -> None:
        self.model, self.slots, self.device = model, slots, next(model.parameters()).device
        self._rows: list[dict[str, Any]] = []

    def begin(self, ids: Sequence[int], adapter: str | None) -> Prompt:
        return Prompt(ids, adapter, {}, 0)

    def read(self, prompt: Prompt, count: int) -> Tensor:
        # At once: not every architecture goes on with a text in the middle.
        logits, prompt.cache = self._forward(prompt.ids, {})
        prompt.read = len(prompt.ids)
        return logits

    def join(self, prompt: Prompt) -> None:
        self._rows.append(prompt.cache)

    def padded(self, rows: int) -> int:
        return rows

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

    def scores(self, ids: Sequence[int]) -> Iterator[Tensor]:
        yield self.model(input_ids=torch.tensor([list(ids)], device=self.device)).logits[0]

    def _forward(self, ids: Sequence[int], cache: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The last logits [V], and what the next call is to be given of this one."""
        out = self.model(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=True, **cache)
        kept = next(name for name in ("past_key_values", "cache_params") if getattr(out, name, None) is not None)
        return out.logits[0, -1], {kept: out[kept]}
