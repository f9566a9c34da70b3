"""Greedy answers to many prompts at once.

The prompts are read packed, what they all begin with once, and its keys and values stay there once for all rows: each
step's new tokens see them by one product (Juravsky et al. 2024, Hydragen). Each row's other keys and values lie in
buffers, aligned at the right, and each step appends to them in place. Answers that have ended leave the batch.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

from tunesmith.conversation.render import Rendered
from tunesmith.inference.engine import Sampling
from tunesmith.models.attention import CannotPack, Span, laid_out, refuse_extras, stepping
from tunesmith.models.packed import REFUSALS, PackedForward
from tunesmith.models.packs import common_beginning
from tunesmith.models.shapes import rounded, rounded_rows

ATTENTION = "tunesmith_decode"
CACHE_BYTES, BATCH_ROWS = 2**30, 256  # of a batch's keys and values; of its prompts
READ_TOKENS = 2048  # of prompts in one forward pass

Begun = tuple[Tensor, Tensor]  # keys and values [G, P, D] of what all rows begin with


class _Now(NamedTuple):
    """What a step's attention needs to know.

    Attributes:
        hidden_BS: -inf where a row's keys are padding or not there yet, 0 elsewhere.
        filled: how many keys of its own a row has, with padding.
        begun: for each layer, what all rows begin with.
    """

    hidden_BS: Tensor
    filled: int
    begun: list[Begun | None]


_now: ContextVar[_Now] = ContextVar("the step at hand")


class _Read(DynamicLayer):
    """Keeps the keys and values of packed prompts: [1, G, T, D]."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = key_states, value_states
        return key_states, value_states


class _Buffer(DynamicLayer):
    """Keys and values [B, G, S, D] of which `filled` tokens are there, and zeros after them; beside them, what all rows
    begin with. A product of a part of a buffer would copy that part each time; so what is handed out is the whole,
    which grows now and then.

    Args:
        parts: what was read, each with the places [B, W] of its rows' own tokens.
        begun: the places [P] in the first of what all rows begin with.
    """

    def __init__(self, parts: Sequence[tuple[_Read, Tensor]], begun_P: Tensor) -> None:
        super().__init__()
        first = parts[0][0]
        self.begun: Begun | None = None
        if len(begun_P):
            self.begun = first.keys[0].index_select(1, begun_P), first.values[0].index_select(1, begun_P)
        self.filled = parts[0][1].shape[1]
        room = rounded(self.filled + 1) - self.filled
        self.keys = _spread([(read.keys, take_BW) for read, take_BW in parts], room)
        self.values = _spread([(read.values, take_BW) for read, take_BW in parts], room)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        more = rounded(self.filled + 1) - self.keys.shape[2]
        if more > 0:
            self.keys, self.values = (F.pad(x, (0, 0, 0, more)) for x in (self.keys, self.values))
        self.keys[:, :, self.filled], self.values[:, :, self.filled] = key_states[:, :, 0], value_states[:, :, 0]
        self.filled += 1
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def _spread(parts: Sequence[tuple[Tensor, Tensor]], room: int) -> Tensor:
    """Packed [1, G, T, D], each with the places [B, W] of its rows' tokens -> [all B, G, W + room, D]."""
    like, width = parts[0][0], parts[0][1].shape[1]
    buffer = like.new_empty(sum(len(take) for _, take in parts), like.shape[1], width + room, like.shape[3])
    buffer[:, :, width:] = 0
    start = 0
    for x, take_BW in parts:
        found = x[0].index_select(1, take_BW.flatten()).unflatten(1, take_BW.shape)
        buffer[start : start + len(take_BW), :, :width] = found.transpose(0, 1)
        start += len(take_BW)
    return buffer


def decode_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One new token a row: query [B, H, 1, D], key and value [B, G, S, D] -> [B, 1, H, D]."""
    refuse_extras(others)
    now = _now.get()
    first = max(0, now.filled - sliding_window) if sliding_window is not None else 0
    hidden = now.hidden_BS[:, None, None, first : key.shape[2]]
    key, value, begun = key[:, :, first:], value[:, :, first:], now.begun[module.layer_idx]  # type: ignore[index]
    return one_token(query, key, value, scaling, lambda scores: scores.add_(hidden), begun), None


def one_token(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    hide: Callable[[Tensor], Tensor],
    begun: Begun | None = None,
) -> Tensor:
    """Attention of one new token a row: query [B, H, 1, D], key and value [B, G, S, D] -> [B, 1, H, D]. The heads that
    share keys are one product; `hide` takes what a row does not see out of the scores [B, G, H / G, S]. All rows see
    what they have `begun` with, too."""
    q = query.unflatten(1, (key.shape[1], -1))[:, :, :, 0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = hide(torch.matmul(q, key.transpose(2, 3)))
    if not begun:
        out = torch.matmul(torch.softmax(scores, -1), value)  # in float32 inside, whatever comes in and goes out
        return out.flatten(1, 2)[:, None]
    keys, values = begun
    before = _by_group(q, keys.transpose(1, 2))
    shares = torch.softmax(torch.cat((before, scores), -1), -1)
    out = torch.matmul(shares[..., before.shape[-1] :], value)
    return out.add_(_by_group(shares[..., : before.shape[-1]], values)).flatten(1, 2)[:, None]


def _by_group(x_BGRK: Tensor, y_GKN: Tensor) -> Tensor:
    """Each row's products [B, G, R, N] with what all rows have, one matrix product a group."""
    rows = x_BGRK.transpose(0, 1)
    return torch.bmm(rows.flatten(1, 2), y_GKN).unflatten(1, rows.shape[1:3]).transpose(0, 1)


class Noise:
    """Makes the likeliest token a draw: Gumbel noise on logits / temperature (Maddison et al. 2014). A row's noise
    follows from the seed and its prompt, so its answer does not depend on the rows beside it."""

    def __init__(self, sampling: Sampling, prompts: Sequence[list[int]]) -> None:
        self.temperature = sampling.temperature
        seeds = [zlib.crc32(f"{sampling.seed}:{ids}".encode()) for ids in prompts]
        self.sources = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, logits_BV: Tensor, rows: Iterable[int]) -> Tensor:
        even = torch.stack([torch.rand(logits_BV.shape[-1], generator=self.sources[row]) for row in rows])
        noise = -(-even.clamp_min(1e-20).log()).log()
        return logits_BV.float() / self.temperature + noise.to(logits_BV.device)


class Decoder:
    """A causal language model that answers in batches.

    Raises:
        CannotPack: the model can't be run packed, or stepping gives next tokens other scores than reading does.
    """

    def __init__(self, forward: PackedForward) -> None:
        if not forward.packed:
            raise CannotPack(forward.why)
        self.forward, self.model = forward, forward.model
        self.config = self.model.config.get_text_config()
        AttentionInterface.register(ATTENTION, decode_attention)
        self._check()

    def greedy(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        tick: Callable[[float], None],
        noise: Noise | None = None,
    ) -> list[list[int]]:
        """Each prompt's answer, up to and with the stop id, drawn where there is noise. `tick` is told how much more
        is done, in prompts."""
        logits, past, positions, hidden_BS = self._read(prompts, max_new_tokens)
        alive = torch.arange(len(prompts))
        ended: set[int] = set()
        answers: list[list[int]] = [[] for _ in prompts]
        for step in range(max_new_tokens):
            tokens = (noise(logits, alive.tolist()) if noise else logits).max(-1).indices  # argmax takes longer
            going, over = [], 0
            filling = []  # rows that have ended, and stay where a batch is to have one of few sizes
            for place, (number, token) in enumerate(zip(alive.tolist(), tokens.tolist(), strict=True)):
                if number in ended:
                    filling.append(place)
                    continue
                answers[number].append(token)
                if token in stop_ids:
                    ended.add(number)
                    filling.append(place)
                    over += 1
                else:
                    going.append(place)
            tick((len(going) + over * (max_new_tokens - step)) / max_new_tokens)
            if not going or step == max_new_tokens - 1:
                break
            size = rounded_rows(len(going)) if self.forward.few else len(going)
            if size < len(alive):
                kept = torch.tensor(going + filling[: size - len(going)])
                alive, tokens = alive[kept], tokens[kept.to(tokens.device)]
                kept = kept.to(positions.device)
                positions, hidden_BS = positions[kept], hidden_BS[kept]
                for layer in past.layers:
                    layer.keep(kept)
            logits = self._step(tokens, past, positions, hidden_BS)
            positions = positions + 1
        return answers

    def batches(self, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Indices of prompts, grouped by length so that each group's keys and values fit the memory for them."""
        begun = self._alike(prompts, max_new_tokens)[1]
        lengths = [len(prompt) - begun for prompt in prompts]
        groups: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[groups[-1][0]] if groups else 0
            full = (
                (len(groups[-1]) + 1) * (longest + max_new_tokens) * self.token_bytes > CACHE_BYTES if groups else True
            )
            if full or len(groups[-1]) == BATCH_ROWS:
                groups.append([])
            groups[-1].append(i)
        return groups

    def _read(self, prompts: Sequence[list[int]], room: int) -> tuple[Tensor, Cache, Tensor, Tensor]:
        """Next-token logits [B, V], the cache, each row's next position [B] and its hidden keys [B, S]."""
        before, (alike, begun) = len(self.forward.virtual_ids), self._alike(prompts, room)
        device, width = self.forward.device, before + max(map(len, prompts)) - begun
        length_B = torch.tensor([before + len(p) for p in prompts], device=device)
        self.model.set_attn_implementation(self.forward.attention)
        hidden, reads, places = [], [], []
        rows = [Rendered(ids, [0.0] * len(ids)) for ids in prompts]
        for part in _in_order([len(row) - alike for row in rows], READ_TOKENS - alike):
            batch = self.forward.pack(rows[part])
            read = Cache(layers=[_Read() for _ in range(self.config.num_hidden_layers)])
            with laid_out(batch.layout):
                x = self.forward.backbone(
                    input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], past_key_values=read
                ).last_hidden_state[0]
            ends = torch.tensor([row.start + row.length for row in batch.layout.rows], device=device)
            hidden.append(x.index_select(0, ends - 1))
            reads.append(read)
            places.append([_places(row) for row in batch.layout.rows])
        begun_P = torch.tensor(places[0][0][:begun], dtype=torch.long, device=device)
        takes = [_aligned([row[begun:] for row in rows], width).to(device) for rows in places]
        layers = zip(*(read.layers for read in reads), strict=True)
        past = Cache(layers=[_Buffer(list(zip(layer, takes, strict=True)), begun_P) for layer in layers])
        at_S = torch.arange(rounded(width + room), device=device)
        absent = (at_S < (width + begun - length_B)[:, None]) | (at_S >= width)
        hidden_BS = torch.zeros(absent.shape, device=device, dtype=x.dtype).masked_fill_(absent, -torch.inf)
        return self.model.get_output_embeddings()(torch.cat(hidden)), past, length_B, hidden_BS

    def _alike(self, prompts: Sequence[list[int]], room: int) -> tuple[int, int]:
        """How many tokens all prompts begin with, and how many of all rows' keys (virtual tokens' too) lie apart:
        none where a sliding window would hide some of them from a row."""
        if not self.forward.share:
            return 0, 0
        before = len(self.forward.virtual_ids)
        alike = common_beginning([Rendered(ids, [0.0] * len(ids)) for ids in prompts])
        window = getattr(self.config, "sliding_window", None)
        fits = window is None or before + max(map(len, prompts)) + room <= window
        return alike, before + alike if fits else 0

    def _step(self, tokens_B: Tensor, past: Cache, positions_B: Tensor, hidden_BS: Tensor) -> Tensor:
        self.model.set_attn_implementation(ATTENTION)
        filled = past.layers[0].filled
        hidden_BS[:, filled] = 0
        now = _Now(hidden_BS, filled + 1, [layer.begun for layer in past.layers])
        with _set(_now, now), stepping(decode_attention):
            hidden = self.forward.backbone(
                input_ids=tokens_B[:, None], position_ids=positions_B[:, None], past_key_values=past, use_cache=True
            ).last_hidden_state[:, 0]
        logits: Tensor = self.model.get_output_embeddings()(hidden)
        return logits

    @torch.no_grad()
    def _check(self) -> None:
        """Read and step twice, and hold the scores against reading it all."""
        rows = [r.ids for r in self.forward.probe]
        try:
            _, past, positions, hidden = self._read([ids[:-2] for ids in rows], 2)
            kept = [x[0, :, 0] for layer in past.layers for x in (layer.keys, layer.values) if x is not None]
            self.token_bytes = sum(x.numel() * x.element_size() for x in kept)
            self._step(torch.tensor([ids[-2] for ids in rows], device=self.forward.device), past, positions, hidden)
            last = torch.tensor([ids[-1] for ids in rows], device=self.forward.device)
            found = self._step(last, past, positions + 1, hidden).float().log_softmax(-1)
            expected = self._read(rows, 1)[0].float().log_softmax(-1)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            raise CannotPack(str(error)) from error
        off = (found - expected).abs().max().item()
        if not off <= 10 * self.forward.tolerance:
            raise CannotPack(f"scores of next tokens are off by {off:.2g}")


def _in_order(lengths: Sequence[int], capacity: int) -> Iterator[slice]:
    """Rows in runs of at most `capacity` tokens, or of one."""
    start, tokens = 0, 0
    for number, length in enumerate(lengths):
        if number > start and tokens + length > capacity:
            yield slice(start, number)
            start, tokens = number, 0
        tokens += length
    yield slice(start, len(lengths))


def _places(row: Span) -> list[int]:
    """Where a row's tokens lie in its pack."""
    return [*range(row.at, row.at + row.before), *range(row.start, row.start + row.length)]


def _aligned(rows: Sequence[list[int]], width: int) -> Tensor:
    """Numbers aligned at the right, 0 for padding. [B, W]"""
    return torch.tensor([[0] * (width - len(row)) + row for row in rows])


@contextlib.contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
