"""Attention of rows that lie end to end in one sequence, none seeing another.

Rows of about the same length are computed together as batched matrix products, the heads that share keys
folded into one; what the rows of a family begin with is there once, and each of their keys starts with it. The
backward pass is written out and keeps the probabilities: [rows, heads, L, K], never the sequence's square. Where a
row is too long for that, rows go through torch's own attention one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.models import cuda
from tunesmith.models.shapes import rounded, rounded_rows

LONGEST_KEPT = 512  # keys; with more of them the probabilities outgrow the other activations
KEYS_AT_ONCE = 16_384  # of the rows of one group: each has its own copy of what they share
PADDING = 1.25  # a group's longest row may be so much longer than its shortest
Made = TypeVar("Made")


class CannotPack(Exception):
    """This model's attention wants something that row-by-row attention does not offer."""


@dataclass(frozen=True)
class Group:
    """Rows of about the same length: B of them, padded to L tokens, with K = before + L keys each.

    Attributes:
        at, before: where in the sequence the tokens lie that each of these rows also sees, and how many they are; maybe
            with some that `seen_LK` hides.
        rows: B; with those that only fill the group up.
        take: [B * L] where the tokens lie in the sequence; padding repeats the row's last one.
        real: which of those B * L are no padding.
        seen_LK: whether a query sees a key. Padding lies after all that a real token sees.
    """

    at: int
    before: int
    rows: int
    take: Tensor
    real: Tensor
    seen_LK: Tensor
    _masks: dict[torch.dtype, Tensor] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        return len(self.seen_LK)

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[L, K]: 0 where a query sees a key, -inf elsewhere (of the scores' own type: mixed ones add slowly)."""
        if dtype not in self._masks:
            self._masks[dtype] = torch.zeros_like(self.seen_LK, dtype=dtype).masked_fill_(~self.seen_LK, -torch.inf)
        return self._masks[dtype]

    def fold(self, x_MHD: Tensor, groups: int) -> Tensor:
        """[B * L, H, D] -> [B * G, H / G * L, D]: the heads that share keys lie one after the other."""
        _, heads, width = x_MHD.shape
        x = x_MHD.view(self.rows, self.length, groups, heads // groups, width).permute(0, 2, 3, 1, 4)
        return x.reshape(self.rows * groups, -1, width)

    def unfold(self, x_NRD: Tensor) -> Tensor:
        """`fold` undone, without the padding."""
        x = x_NRD.view(self.rows, -1, self.length, x_NRD.shape[-1]).transpose(1, 2)
        return x.reshape(len(self.take), -1, x.shape[-1]).index_select(0, self.real)

    def keys(self, x_TGD: Tensor) -> Tensor:
        """[T, G, D] -> [B * G, K, D]: what the rows begin with, then their own."""
        x = x_TGD.index_select(0, self.take).unflatten(0, (self.rows, self.length)).transpose(1, 2)
        if self.before:
            begun = x_TGD[self.at : self.at + self.before].transpose(0, 1)
            x = torch.cat((begun.expand(self.rows, -1, -1, -1), x), 2)
        return x.reshape(-1, *x.shape[2:])

    def padded(self, x_THD: Tensor) -> Tensor:
        """[T, H, D] -> [B * L, H, D], zero where there is padding."""
        out = x_THD.new_zeros(len(self.take), *x_THD.shape[1:])
        return out.index_copy_(0, self.real, x_THD.index_select(0, self.take[self.real]))


class Family(NamedTuple):
    """Rows that begin alike: `shared` tokens of all of them, and how many more each has."""

    shared: int
    lengths: list[int]


class Span(NamedTuple):
    """A row's own tokens, and those it begins with: where they start and how many they are."""

    start: int
    length: int
    at: int
    before: int


@dataclass(frozen=True)
class Layout:
    """How rows lie in a sequence: family after family, what its rows begin with, then each row's other tokens.

    Attributes:
        padding: tokens after the last row, which only see one another.
        few: whether groups are filled up to sizes that come again.
    """

    families: list[Family]
    device: torch.device | str = "cpu"
    padding: int = 0
    few: bool = False
    _made: dict[tuple[str, int | None], Any] = field(default_factory=dict, repr=False)

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return self.padding + sum(family.shared + sum(family.lengths) for family in self.families)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(family.shared + max(family.lengths) for family in self.families)

    @cached_property
    def rows(self) -> list[Span]:
        """Where each row lies, in order."""
        return [span for _, spans in self._families for span in spans]

    @cached_property
    def spans(self) -> list[Span]:
        """Everything that attends by itself, in the sequence's order: what a family begins with, then its rows;
        the padding."""
        found = [span for first, spans in self._families for span in ([first] if first else []) + spans]
        end = found[-1].start + found[-1].length
        return [*found, Span(end, self.padding, 0, 0)] if self.padding else found

    @cached_property
    def _families(self) -> list[tuple[Span | None, list[Span]]]:
        found, start = [], 0
        for family in self.families:
            first = Span(start, family.shared, 0, 0) if family.shared else None
            at, start = start, start + family.shared
            spans = []
            for length in family.lengths:
                spans.append(Span(start, length, at, family.shared))
                start += length
            found.append((first, spans))
        return found

    def groups(self, window: int | None) -> tuple[list[Group], Tensor]:
        """The rows in groups, and for each token of the sequence its place among the groups' real tokens."""
        return self.once("groups", window, lambda: self._plan(window))

    def once(self, what: str, window: int | None, make: Callable[[], Made]) -> Made:
        """What a kind of attention makes of the layout: at the first layer, and kept for the others of its window."""
        if (what, window) not in self._made:
            self._made[what, window] = make()
        made: Made = self._made[what, window]
        return made

    def _plan(self, window: int | None) -> tuple[list[Group], Tensor]:
        batches: list[list[Span]] = []
        for span in sorted(self.spans, key=lambda s: (s.before, s.before and s.at, s.length)):
            last = batches[-1] if batches else []
            alike = last and span.before == last[0].before and (not span.before or span.at == last[0].at)
            room = (len(last) + 1) * (span.before + span.length) <= KEYS_AT_ONCE
            if alike and room and span.length <= PADDING * last[0].length:
                last.append(span)
            else:
                batches.append([span])
        groups = [self._group(batch, window) for batch in batches]
        order = torch.cat([group.take[group.real] for group in groups])
        return groups, torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=self.device))

    def _group(self, spans: list[Span], window: int | None) -> Group:
        start, _, at, before = spans[0]
        longest, begun = max(span.length for span in spans), before
        if self.few:
            longest = rounded(longest)
            begun = before and min(rounded(before), self.tokens - at)  # the tokens after those are hidden
            spans = spans + [Span(start, 0, at, before)] * (rounded_rows(len(spans)) - len(spans))
        start_B1 = torch.tensor([[span.start] for span in spans], device=self.device)
        length_B1 = torch.tensor([[span.length] for span in spans], device=self.device)
        at_L = torch.arange(longest, device=self.device)
        take_BL = start_B1 + torch.minimum(at_L, length_B1 - 1).clamp_min(0)
        seen_LK = _mask(len(at_L), before + len(at_L), window, self.device)
        seen_LK = torch.cat((F.pad(seen_LK[:, :before], (0, begun - before)), seen_LK[:, before:]), 1)
        return Group(at, begun, len(spans), take_BL.flatten(), (at_L < length_B1).flatten().nonzero()[:, 0], seen_LK)


_layout: ContextVar[Layout] = ContextVar("how the rows lie in the sequence")
_kind: ContextVar[str] = ContextVar("which attention", default="grouped")
_attend: ContextVar[Callable[..., Any] | None] = ContextVar("attention of one new token a row", default=None)


@contextlib.contextmanager
def laid_out(layout: Layout, kind: str = "grouped") -> Iterator[None]:
    """Within this, attention is that of rows laid out so, by this kind of attention."""
    tokens = _layout.set(layout), _kind.set(kind)
    try:
        yield
    finally:
        _layout.reset(tokens[0])
        _kind.reset(tokens[1])


@contextlib.contextmanager
def stepping(attend: Callable[..., Any]) -> Iterator[None]:
    """Within this, every row has one new token, and attention is `attend(module, query [B, H, 1, D], key and value
    [B, G, S, D] with those before, None, scale, window)` -> [B, 1, H, D], ..."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


def step_attention() -> Callable[..., Any] | None:
    """What attends if every row has one new token now."""
    return _attend.get()


def laid_out_now() -> Layout | None:
    """How rows lie in the sequence at hand; None outside of a packed forward."""
    return _layout.get(None)


def packing() -> bool:
    """Whether a layout is set."""
    return _layout.get(None) is not None


def refuse_extras(given: dict[str, Any]) -> None:
    """Raise CannotPack for what a model may ask of its attention and ours does not do."""
    if any(given.get(name) is not None for name in ("softcap", "s_aux", "sinks", "position_bias")):
        raise CannotPack("attention with a soft cap, sinks or a position bias")
    if any(given.get(name) is not None for name in ("indices", "block_indices")):
        raise CannotPack("attention to some tokens that the layer chooses")


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    An entry of transformers' attention interface; how rows lie in T comes from `laid_out`.
    """
    refuse_extras(others)
    if attention_mask is not None:  # transformers makes none for this attention: it is the layer's own
        raise CannotPack("attention with a mask of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    module._attends_with = scale, sliding_window  # type: ignore[assignment]  # what a shorter way needs to know
    if not dropout:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attention(q, k, v, scale, sliding_window)[None], None
    return _one_by_one(query, key, value, scale, dropout, sliding_window), None


def attention(q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, scale: float, window: int | None = None) -> Tensor:
    """Causal attention within each row -> [T, H, E]."""
    layout, kind = _layout.get(), _kind.get()
    if kind in ("flash", "flex"):
        return (cuda.flash if kind == "flash" else cuda.flex)(q_THD, k_TGD, v_TGE, layout, scale, window)
    if kind == "rows" or layout.longest > LONGEST_KEPT:
        q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_TGD, v_TGE))
        return _one_by_one(q, k, v, scale, 0.0, window)[0]
    out: Tensor = _Grouped.apply(q_THD, k_TGD, v_TGE, layout, scale, window)
    return out


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, window: int | None) -> Tensor:
        ctx.layout, ctx.window, ctx.scale = layout, window, scale
        groups, back = layout.groups(window)
        kept, outs = [q, k, v], []
        for group in groups:
            q_NRD = group.fold(q.index_select(0, group.take), k.shape[1]).mul_(scale)
            k_NKD, v_NKE = group.keys(k), group.keys(v)
            scores = torch.bmm(q_NRD, k_NKD.transpose(1, 2))
            scores.unflatten(1, (-1, group.length)).add_(group.mask(q.dtype))
            p_NRK = torch.softmax(scores, -1)  # in float32 inside, whatever comes in and goes out
            outs.append(group.unfold(torch.bmm(p_NRK, v_NKE)))
            kept.append(p_NRK)
        ctx.save_for_backward(*kept)
        return torch.cat(outs).index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad, (q, k, v, *kept) = grad_outputs[0], ctx.saved_tensors
        groups, back = ctx.layout.groups(ctx.window)
        heads = k.shape[1]
        grads: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        begun: list[tuple[str, Group, Tensor]] = []  # what rows add to the keys and values that they begin with
        for group, p_NRK in zip(groups, kept, strict=True):
            q_NRD = group.fold(q.index_select(0, group.take), heads).mul_(ctx.scale)
            k_NKD, v_NKE = group.keys(k), group.keys(v)
            grad_NRE = group.fold(group.padded(grad), heads)
            dp = torch.bmm(grad_NRE, v_NKE.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p_NRK, -1, p_NRK.dtype)
            grads["q"].append(group.unfold(torch.bmm(ds, k_NKD)))
            for name, d in (("k", ds.transpose(1, 2) @ q_NRD), ("v", p_NRK.transpose(1, 2) @ grad_NRE)):
                d_BKGD = d.unflatten(0, (group.rows, heads)).transpose(1, 2)
                grads[name].append(d_BKGD[:, group.before :].flatten(0, 1).index_select(0, group.real))
                if group.before:
                    begun.append((name, group, d_BKGD[:, : group.before].sum(0)))
        dq, dk, dv = (torch.cat(grads[name]).index_select(0, back) for name in "qkv")
        for name, group, d in begun:
            (dk if name == "k" else dv)[group.at : group.at + group.before] += d
        return dq.mul_(ctx.scale), dk, dv, None, None, None


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, window: int | None) -> Tensor:
    """[1, H, T, D], [1, G, T, D], [1, G, T, E] -> [1, T, H, E], a row at a time."""
    grouped, layout = query.shape[1] != key.shape[1], _layout.get()
    out = []
    for start, length, at, before in layout.spans:
        q, k, v = (x[:, :, start : start + length] for x in (query, key, value))
        if layout.few:  # padding lies behind all that a token sees
            q, k, v = (F.pad(x, (0, 0, 0, rounded(length) - length)) for x in (q, k, v))
        if before:
            k, v = (torch.cat((x[:, :, at : at + before], own), 2) for x, own in ((key, k), (value, v)))
        plain = q.shape[2] == k.shape[2] and (window is None or k.shape[2] <= window)
        mask = None if plain else _mask(q.shape[2], k.shape[2], window, q.device)
        out.append(
            F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=plain, scale=scale, enable_gqa=grouped)[
                :, :, :length
            ]
        )
    return torch.cat(out, 2).transpose(1, 2).contiguous()


def _mask(queries: int, keys: int, window: int | None, device: torch.device | str) -> Tensor:
    """Which keys [K] the last queries [Q] of a row see."""
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)
    return k <= q if window is None else (k <= q) & (q - k < window)
