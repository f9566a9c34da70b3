"""Many rows in one forward pass, none seeing another, and the loss only where a token carries it.

Rows lie end to end in one sequence without padding; positions restart with each row, and attention is
computed row by row, so that packing changes no number but the time. Logits are made only for the tokens
that carry loss, a chunk at a time, so that memory does not grow with the vocabulary.

Any decoder that takes its attention from transformers' attention interface can be run like this. For the
others (and for whatever `PackedForward` finds to give another loss), rows go through the model one by one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.conversation.render import Rendered

ATTENTION = "tunesmith_packed"
LOGIT_CHUNK = 256  # tokens whose logits are in memory at once
_lengths: ContextVar[list[int]] = ContextVar("lengths of the rows in the sequence")


class CannotPack(Exception):
    """This model's attention wants something that row-by-row attention does not offer."""


@dataclass(frozen=True)
class Pack:
    """Rows laid end to end.

    Attributes:
        ids_T: token ids.
        positions_T: 0, 1, ... from each row's start.
        weights_T: the loss's weight for predicting the token at this place; 0 at each row's start.
        lengths: tokens in each row; sums to T.
        rows: which rows these are, by the caller's count.
    """

    ids_T: Tensor
    positions_T: Tensor
    weights_T: Tensor
    lengths: list[int]
    rows: list[int]


def pack(rendered: Sequence[Rendered], rows: Sequence[int], device: str | torch.device = "cpu") -> Pack:
    """Lay rows end to end."""
    lengths = [len(r) for r in rendered]
    ids = [token for r in rendered for token in r.ids]
    weights = [weight for r in rendered for weight in (0.0, *r.weights[1:])]
    positions = [i for length in lengths for i in range(length)]
    return Pack(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        lengths,
        list(rows),
    )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of rows, grouped so that each group's tokens fit `capacity` (longest first, tightest bin).

    A row longer than `capacity` gets a group of its own.
    """
    bins: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(room, b) for b, (room, _) in enumerate(bins) if room >= lengths[i]]
        if fitting:
            room, b = min(fitting)
            bins[b][1].append(i)
            bins[b] = (room - lengths[i], bins[b][1])
        else:
            bins.append((capacity - lengths[i], [i]))
    return [sorted(members) for _, members in bins]


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

    An entry of transformers' attention interface; the rows' lengths come from `lengths_are`.
    """
    if any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise CannotPack("attention with a soft cap, sinks or a position bias")
    lengths = _lengths.get()
    grouped = query.shape[1] != key.shape[1]
    out = []
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    for q, k, v in rows:
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            at = torch.arange(q.shape[2], device=q.device)
            mask = (at[:, None] >= at) & (at[:, None] - at < sliding_window)
        out.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def lengths_are(lengths: list[int]) -> Iterator[None]:
    token = _lengths.set(lengths)
    try:
        yield
    finally:
        _lengths.reset(token)


class _FrozenHeadLoss(torch.autograd.Function):
    """Per-token negative log-likelihood of a frozen output layer.

    Each token's gradient with respect to its hidden state is made in the forward pass, while its logits
    are there; backward only scales it. What is kept is [N, D], never [N, V].
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Tensor:
        want = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for h, target in zip(hidden_ND.split(LOGIT_CHUNK), targets_N.split(LOGIT_CHUNK), strict=True):
            logits = F.linear(h, weight_VD, bias_V).float()
            total = logits.logsumexp(-1, keepdim=True)
            picked = logits.gather(1, target[:, None])
            losses.append((total - picked)[:, 0])
            if want:
                probability = logits.sub_(total).exp_()
                probability.scatter_add_(1, target[:, None], torch.full_like(picked, -1.0))
                gradients.append(probability.to(weight_VD.dtype) @ weight_VD)
        if want:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * grad_outputs[0][:, None].to(gradient_ND.dtype), None, None, None)


def head_nll(hidden_ND: Tensor, head: torch.nn.Linear, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood [N] in nats of `targets` under an output layer, in bounded memory."""
    if not head.weight.requires_grad:
        loss: Tensor = _FrozenHeadLoss.apply(hidden_ND, head.weight, head.bias, targets_N)
        return loss

    def chunk(h: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(h).float(), target, reduction="none")

    chunks = zip(hidden_ND.split(LOGIT_CHUNK), targets_N.split(LOGIT_CHUNK), strict=True)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in chunks])


class PackedForward:
    """A causal language model as a function from packs to per-token losses.

    Args:
        model: a transformers causal LM, with or without PEFT's layers in it.
        probe: two or more short rows on which packed and one-by-one losses are compared; where they
            differ by more than `tolerance` nats a token, rows go one by one (`why` says so).
    """

    def __init__(self, model: Any, probe: Sequence[Rendered], tolerance: float | None = None) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = next(self.model.parameters()).device
        self.packed, self.why = True, "rows packed, attention per row, logits where loss is"
        self._slow_attention = self.model.config._attn_implementation
        coarse = next(self.model.parameters()).dtype != torch.float32
        self._check(probe, tolerance or (0.1 if coarse else 1e-3))

    def nll(self, batch: Pack) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood [N] of the N tokens that carry weight, and where they are in the pack [N]."""
        places_N = batch.weights_T.nonzero()[:, 0]
        if self.packed:
            return self._together(batch, places_N), places_N
        return self._one_by_one(batch, places_N), places_N

    def _together(self, batch: Pack, places_N: Tensor) -> Tensor:
        backbone = getattr(self.model, self.model.base_model_prefix)
        with lengths_are(batch.lengths):
            hidden = backbone(
                input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], use_cache=False
            ).last_hidden_state[0]
        return head_nll(hidden[places_N - 1], self.model.get_output_embeddings(), batch.ids_T[places_N])

    def _one_by_one(self, batch: Pack, places_N: Tensor) -> Tensor:
        losses = []
        start = 0
        for length in batch.lengths:
            here = places_N[(places_N >= start) & (places_N < start + length)]
            if len(here):
                ids = batch.ids_T[start : start + length][None]
                logits = self.model(input_ids=ids, use_cache=False).logits[0, here - start - 1]
                losses.append(F.cross_entropy(logits.float(), batch.ids_T[here], reduction="none"))
            start += length
        return torch.cat(losses)

    @torch.no_grad()
    def _check(self, probe: Sequence[Rendered], tolerance: float) -> None:
        everything = [Rendered(r.ids, [1.0] * len(r)) for r in probe]
        batch = pack(everything, range(len(probe)), self.device)
        places_N = batch.weights_T.nonzero()[:, 0]
        training = self.model.training
        self.model.eval()
        try:
            expected = self._one_by_one(batch, places_N)
            from transformers import AttentionInterface

            AttentionInterface.register(ATTENTION, packed_attention)
            self.model.set_attn_implementation(ATTENTION)
            if self.model.config._attn_implementation != ATTENTION:
                raise CannotPack("this architecture does not use transformers' attention interface")
            off = (self._together(batch, places_N) - expected).abs().mean().item()
            if not off <= tolerance:
                raise CannotPack(f"packed losses are off by {off:.2g} nats a token")
        except (CannotPack, AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
            self.packed, self.why = False, f"one row at a time: {error}"
            self.model.set_attn_implementation(self._slow_attention)
        finally:
            self.model.train(training)
