"""Many rows in one forward pass, none seeing another, and the loss only where a token carries it.

Rows lie end to end in one sequence without padding; positions restart with each row, and attention is
computed row by row, so that packing changes no number but the time. What all rows of a pack begin with (a
system prompt, as a rule), or the rows that belong together (the prompt of two answers), is computed once: every
row attends to it, and its gradient is the sum of theirs.
Logits are made only for the tokens that carry loss, a chunk at a time, so that memory does not grow with the
vocabulary.

Any decoder that takes its attention from transformers' attention interface can be run like this. For the
others (and for whatever `PackedForward` finds to give another loss), rows go through the model one by one.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.conversation.render import Rendered
from tunesmith.models.activations import recompute_layers, waiting
from tunesmith.models.attention import CannotPack, Family, Layout, laid_out, packed_attention
from tunesmith.models.cuda import choose_attention, liger_there
from tunesmith.models.fused import fuse, unfuse
from tunesmith.models.pieces import compile_pieces
from tunesmith.models.shapes import LOSSES, few_shapes, rounded
from tunesmith.models.ways import Ways

ATTENTION = "tunesmith_packed"
LOGIT_CHUNK = 256  # tokens whose logits are in memory at once
# What a model that can't take what it is given here may raise.
REFUSALS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError)
COARSE = 0.02  # of a loss: what bfloat16's own rounding moves it by, up to 1% on rows that make no sense
SHARED_AT_LEAST = 8  # a shorter common beginning is not worth a mask


@dataclass(frozen=True)
class Pack:
    """Rows laid end to end, after the beginning that they share.

    Attributes:
        ids_T: token ids.
        positions_T: each token's place in its row.
        layout: where the rows lie.
        places_N: the tokens that carry weight.
        before_N: for each of them, the token that predicts it.
        weights_N: their losses' weights.
        owner_N: which row each belongs to, counted within the pack.
    """

    ids_T: Tensor
    positions_T: Tensor
    layout: Layout
    places_N: Tensor
    before_N: Tensor
    weights_N: Tensor
    owner_N: Tensor


def common_beginning(rows: Sequence[Rendered]) -> int:
    """How many tokens all rows begin with and none learns (a system prompt, as a rule), or 0 where so few
    are not worth it. At least one token of each row is left."""
    if len(rows) < 2:
        return 0
    first, *others = rows
    limit = min(len(r) for r in rows) - 1
    shared = 0
    while shared < limit and not any(r.weights[shared] for r in rows):
        if any(r.ids[shared] != first.ids[shared] for r in others):
            break
        shared += 1
    return shared if shared >= SHARED_AT_LEAST else 0


def families(rows: Sequence[Rendered], sizes: Sequence[int] | None = None) -> list[tuple[int, list[Rendered]]]:
    """Rows in families that share their beginning: all of them in one, or those that belong together in one each,
    whichever leaves fewer tokens to compute.

    Args:
        sizes: how many consecutive rows belong together; each alone if None.
    """
    together = [(common_beginning(rows), list(rows))]
    if not sizes or max(sizes) == 1:
        return together
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = [list(rows[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    apart = [(common_beginning(group), group) for group in groups]
    return min(together, apart, key=lambda found: sum(tokens(shared, group) for shared, group in found))


def tokens(shared: int, rows: Sequence[Rendered]) -> int:
    """How many tokens rows take whose first `shared` are there once."""
    return shared + sum(len(row) - shared for row in rows)


def pack(
    rows: Sequence[Rendered],
    device: str | torch.device = "cpu",
    share: bool = True,
    sizes: Sequence[int] | None = None,
    few: bool = False,
) -> Pack:
    """Lay rows end to end; what a family of them (`families`) begins with is there, and computed, once.

    Args:
        few: whether the sequence and its groups are filled up to sizes that come again (`shapes.py`).
    """
    ids: list[int] = []
    positions: list[int] = []
    places, before, weights, owner = [], [], [], []
    found = families(rows, sizes) if share else [(0, list(rows))]
    number = 0
    for shared, members in found:
        at = len(ids)
        ids += members[0].ids[:shared]
        positions += range(shared)
        for row in members:
            start = len(ids) - shared
            for i in range(max(shared, 1), len(row)):
                if row.weights[i]:
                    places.append(start + i)
                    before.append(start + i - 1 if i > shared else at + shared - 1)
                    weights.append(row.weights[i])
                    owner.append(number)
            ids += row.ids[shared:]
            positions += range(shared, len(row))
            number += 1
    padding = rounded(len(ids)) - len(ids) if few else 0
    ids += ids[:1] * padding
    positions += range(padding)
    family = [Family(shared, [len(r) - shared for r in members]) for shared, members in found]
    return Pack(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        Layout(family, device, padding, few),
        torch.tensor(places, dtype=torch.long, device=device),
        torch.tensor(before, dtype=torch.long, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        torch.tensor(owner, dtype=torch.long, device=device),
    )


def packs(indices: Sequence[int], rows: Sequence[Sequence[Rendered]], capacity: int) -> list[list[int]]:
    """Some sets of rows that belong together, by index, grouped so that each group's tokens fit `capacity`."""
    chosen = [rows[i] for i in indices]
    every = [row for together in chosen for row in together]
    shared = common_beginning(every)
    apart = [tokens(common_beginning(together), together) for together in chosen]
    if max(map(len, chosen)) == 1 or tokens(shared, every) <= sum(apart):
        groups = best_fit(
            [sum(len(row) - shared for row in together) for together in chosen], max(capacity - shared, 1)
        )
    else:
        groups = best_fit(apart, capacity)
    return [[indices[j] for j in group] for group in groups]


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


class _FrozenHeadLoss(torch.autograd.Function):
    """Per-token negative log-likelihood of a frozen output layer.

    Each token's gradient with respect to its hidden state is made in the forward pass, while its logits
    are there; backward only scales it. What is kept is [N, D], never [N, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        smoothing: float,
        hits: list[Tensor] | None,
    ) -> Tensor:
        want = ctx.needs_input_grad[0]
        losses, gradients = [], []
        for h, target in zip(hidden_ND.split(LOGIT_CHUNK), targets_N.split(LOGIT_CHUNK), strict=True):
            logits = F.linear(h, weight_VD, bias_V)
            if hits is not None:
                hits.append(logits.argmax(-1) == target)
            # Softmax computes in float32 inside; only where nothing is trained is its result worth twice the memory.
            log_p = torch.log_softmax(logits if want else logits.float(), -1)
            picked = log_p.gather(1, target[:, None]).float()
            loss = -picked[:, 0]
            if smoothing:
                loss = (1 - smoothing) * loss - smoothing * log_p.mean(-1, dtype=torch.float32)
            losses.append(loss)
            del log_p
            if want:
                p = torch.softmax(logits, -1)
                at_target = torch.expm1(picked)  # p - 1, exact where p is close to 1
                if smoothing:
                    p.sub_(smoothing / p.shape[1])
                    at_target += smoothing * (1 - 1 / p.shape[1])
                gradients.append(p.scatter_(1, target[:, None], at_target.to(p.dtype)) @ weight_VD)
        if want:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * grad_outputs[0][:, None].to(gradient_ND.dtype), None, None, None, None, None)


def head_nll(
    hidden_ND: Tensor,
    head: torch.nn.Linear,
    targets_N: Tensor,
    smoothing: float = 0.0,
    hits: list[Tensor] | None = None,
) -> Tensor:
    """Negative log-likelihood [N] in nats of `targets` under an output layer, in bounded memory.

    With `smoothing`, of targets that keep 1 - smoothing and give the rest to all tokens alike. `hits` is given which
    targets are the likeliest tokens, [n] at a time.
    """
    if type(head) is torch.nn.Linear and not any(p.requires_grad for p in head.parameters()):
        loss: Tensor = _FrozenHeadLoss.apply(hidden_ND, head.weight, head.bias, targets_N, smoothing, hits)
        return loss

    def chunk(h: Tensor, target: Tensor) -> Tensor:
        logits = head(h).float()
        if hits is not None:
            hits.append(logits.detach().argmax(-1) == target)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    chunks = zip(hidden_ND.split(LOGIT_CHUNK), targets_N.split(LOGIT_CHUNK), strict=True)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in chunks])


def _probe(rows: Sequence[Rendered], longest: int = 24) -> list[Rendered]:
    """Three short rows of different lengths that begin alike, made of the first tokens of given ones."""
    first, second = rows[0].ids[:longest], rows[-1].ids[: longest // 2]
    alike = (first * SHARED_AT_LEAST)[:SHARED_AT_LEAST]
    return [Rendered(alike + ids, [1.0] * (SHARED_AT_LEAST + len(ids))) for ids in (first, second, first[::-1])]


def _longest_alike(config: Any) -> float:
    """Up to how many tokens rows may be to be computed together: rotary angles that depend on the longest row's
    length (dynamic, longrope) would depend on a row's neighbours beyond it."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    if not any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds):
        return math.inf
    limits = [kind.get("original_max_position_embeddings") for kind in kinds]
    limits += [getattr(config, "original_max_position_embeddings", None), config.max_position_embeddings]
    return min(limit for limit in limits if limit)


def _window(config: Any) -> bool:
    """Whether some layers only see a window of a row."""
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True)


class PackedForward:
    """A causal language model as a function from packs to per-token losses (or to scores, where it has a head of
    classes instead).

    Args:
        model: a transformers causal LM or decoder with a `score` head, with or without PEFT's layers in it.
        rows: of the first two, the beginnings are taken to compare packed with one-by-one losses; where they
            differ by more than `tolerance` nats a token (and, of rounded weights, by more than COARSE of the loss),
            rows go one by one (`why` says so).
        ways: which short ways may be taken; all that suit if None.
    """

    def __init__(
        self, model: Any, rows: Sequence[Rendered], tolerance: float | None = None, ways: Ways | None = None
    ) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.virtual_ids: list[int] = getattr(self.model, "virtual_ids", [])
        # With trained keys and values before each row, only the whole says what the model answers.
        config = getattr(model, "active_peft_config", None)
        self.prefixed = getattr(config, "is_prompt_learning", False) and not self.virtual_ids
        self.whole = model if self.prefixed else self.model
        self.device = next(self.model.parameters()).device
        self.ways = ways or Ways()
        self.offload = self.ways.activations == "offload"
        self.share = self.ways.shared  # whether what rows begin with alike is computed once
        self.packed, self.why = True, "rows packed, attention per row, logits where loss is"
        self._slow_attention = self.model.config._attn_implementation
        self._scorer = hasattr(self.model, "score")
        self.longest = _longest_alike(self.model.config.get_text_config())
        dtype = next(self.model.parameters()).dtype
        self._coarse = dtype != torch.float32
        self.few = few_shapes(self.device, dtype)
        self.kind = choose_attention(self.ways.attention, str(self.device), dtype)
        self.probe, self.tolerance = _probe(rows), tolerance or (0.1 if self._coarse else 1e-3)
        failed = compile_pieces(dtype, self.device) if self.ways.compile else ""
        self.compiled = self.ways.compile and not failed
        self._again: list[Any] = []
        self._check()
        self.why += f"; not compiled: {failed}" if failed else ""
        if self.ways.activations != "keep":
            self._again = recompute_layers(self.model)

    def undo(self) -> None:
        """Leave the model as it was found."""
        unfuse(self.model)
        self.model.set_attn_implementation(self._slow_attention)
        for layer in self._again:
            layer.gradient_checkpointing = False

    @property
    def backbone(self) -> Any:
        """The model without its output layer."""
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def attention(self) -> str:
        """The name under which transformers knows the attention that this forward needs."""
        return ATTENTION if self.packed else str(self._slow_attention)

    def pack(self, rows: Sequence[Rendered], sizes: Sequence[int] | None = None) -> Pack:
        """Rows as this model can take them, after its virtual tokens, if it has some. `sizes`: see `families`."""
        if self.virtual_ids:
            rows = [Rendered(self.virtual_ids + r.ids, [0.0] * len(self.virtual_ids) + r.weights) for r in rows]
        share = self.share and self.together(max(map(len, rows)))
        return pack(rows, self.device, share, sizes, self.few)

    def together(self, longest: int) -> bool:
        """Whether rows of so many tokens at most go through the model together."""
        return self.packed and longest <= self.longest

    def nll(self, batch: Pack, smoothing: float = 0.0, hits: list[Tensor] | None = None) -> Tensor:
        """Negative log-likelihood [N] in nats of the pack's N tokens that carry weight (see `head_nll`)."""
        found = self._together if self._can_pack(batch) else self._one_by_one
        return found(batch, smoothing, hits)

    def predicting(self, batch: Pack) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """States [N, D] that predict the N tokens that carry weight, and what makes logits [n, V] of some of them."""
        if self._can_pack(batch):
            return self._hidden(batch, batch.before_N), self.model.get_output_embeddings()
        with self._own_attention():
            return torch.cat([logits for logits, _ in self._separate_logits(batch)]), lambda logits: logits

    def scores(self, batch: Pack) -> Tensor:
        """The scores [R, K] that a model with a head of K classes gives each of the pack's rows at its end."""
        head = self.model.score
        found: Tensor = head(self._ends(batch).to(next(head.parameters()).dtype)).float()
        return found

    def _ends(self, batch: Pack) -> Tensor:
        """The state [R, D] at each row's last token."""
        if self._can_pack(batch):
            places = [row.start + row.length - 1 for row in batch.layout.rows]
            return self._hidden(batch, torch.tensor(places, device=self.device))
        return self._ends_apart(batch)

    def _ends_apart(self, batch: Pack) -> Tensor:
        with self._own_attention():
            rows = [batch.ids_T[row.start : row.start + row.length][None] for row in batch.layout.rows]
            return torch.cat([self.backbone(input_ids=ids, use_cache=False).last_hidden_state[:, -1] for ids in rows])

    def _can_pack(self, batch: Pack) -> bool:
        return self.together(batch.layout.longest)

    def _hidden(self, batch: Pack, places: Tensor) -> Tensor:
        with laid_out(batch.layout, self.kind), waiting(self.offload, self.device):
            hidden = self.backbone(
                input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], use_cache=False
            ).last_hidden_state[0]
        # index_select: its backward adds in a fixed order, where indexing's need not.
        return hidden.index_select(0, places)

    def _together(self, batch: Pack, smoothing: float = 0.0, hits: list[Tensor] | None = None) -> Tensor:
        """The pack's losses; or its rows' states, in units of their spread, where the model has no language head."""
        if self._scorer:
            return self._spread(self._ends(batch))
        before_N, places_N = batch.before_N, batch.places_N
        filling = -len(places_N) % LOSSES if batch.layout.few else 0
        if filling:
            before_N, places_N = F.pad(before_N, (0, filling)), F.pad(places_N, (0, filling))
        head = self.model.get_output_embeddings()
        loss_N = head_nll(self._hidden(batch, before_N), head, batch.ids_T[places_N], smoothing, hits)
        if hits and filling:
            hits[-1] = hits[-1][:-filling]
        return loss_N[: len(batch.places_N)]

    def _one_by_one(self, batch: Pack, smoothing: float = 0.0, hits: list[Tensor] | None = None) -> Tensor:
        if self._scorer:
            return self._spread(self._ends_apart(batch))
        with self._own_attention(), waiting(self.offload, self.device):
            losses = []
            for logits, to in self._separate_logits(batch):
                if hits is not None:
                    hits.append(logits.detach().argmax(-1) == to)
                losses.append(F.cross_entropy(logits.float(), to, reduction="none", label_smoothing=smoothing))
            return torch.cat(losses)

    def _spread(self, states: Tensor) -> Tensor:
        return states.float() / states.float().std()

    @contextlib.contextmanager
    def _own_attention(self) -> Iterator[None]:
        now = self.model.config._attn_implementation
        self.model.set_attn_implementation(self._slow_attention)
        for layer in self._again if self.packed else []:  # in the backward pass it would meet the other attention
            layer.gradient_checkpointing = False
        try:
            yield
        finally:
            self.model.set_attn_implementation(now)
            for layer in self._again:
                layer.gradient_checkpointing = True

    def _separate_logits(self, batch: Pack) -> Iterator[tuple[Tensor, Tensor]]:
        """Each row's logits before its weighted tokens, and those tokens."""
        for number, (start, length, _, _) in enumerate(batch.layout.rows):
            mine = batch.owner_N == number
            if mine.any():
                ids = batch.ids_T[start : start + length][None]
                seen = torch.ones_like(ids)
                logits = self.whole(input_ids=ids, attention_mask=seen, use_cache=False).logits[0, -length:]
                yield logits[batch.before_N[mine] - start], batch.ids_T[batch.places_N[mine]]

    @torch.no_grad()
    def _check(self) -> None:
        """Go packed, with what can be fused, as far as that gives the losses that rows have one by one."""
        start = SHARED_AT_LEAST
        probe = [Rendered(r.ids, [0.0] * start + [1.0] * (len(r) - start)) for r in self.probe]
        training = self.model.training
        self.model.eval()
        try:
            expected = self._one_by_one(pack(probe, self.device, share=False))
            allowed = self.tolerance
            if self._coarse:
                allowed += COARSE * expected.abs().mean().item()
            if self.prefixed:
                raise CannotPack("trained keys and values lie before each row")
            from transformers import AttentionInterface

            AttentionInterface.register(ATTENTION, packed_attention)
            self.model.set_attn_implementation(ATTENTION)
            if not self.ways.packing:
                raise CannotPack("train.speed.packing is off")
            if self.model.config._attn_implementation != ATTENTION:
                raise CannotPack("this architecture does not use transformers' attention interface")
            if getattr(self.model, "is_gradient_checkpointing", False):
                raise CannotPack("its layers are computed again in the backward pass")
            if not self._scorer:
                self._check_head(probe[0])
            liger = liger_there(self.ways.liger, str(self.device))
            counts: Counter[str] = Counter()
            if self.ways.fused:
                counts = fuse(self.model, lambda: self._together(pack(probe, self.device)), liger)
            if self._off(probe, expected) > allowed:
                unfuse(self.model)
                counts.clear()
                off = self._off(probe, expected)
                if off > allowed:
                    raise CannotPack(f"packed losses are off by {off:.2g} nats a token")
            self._check_separation(probe)
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            self.why += f"; fused: {told}" if told else ""
        except torch.OutOfMemoryError:
            raise
        except (CannotPack, *REFUSALS) as error:
            unfuse(self.model)
            self.packed, self.why = False, f"one row at a time: {error}"
            self.model.set_attn_implementation(self._slow_attention)
        finally:
            self.model.train(training)

    def _check_head(self, row: Rendered) -> None:
        """The logits must be the output layer's own: no scale and no soft cap after it, which small ones hide."""
        ids, head = torch.tensor([row.ids], device=self.device), self.model.get_output_embeddings()
        with self._own_attention():
            hook = head.register_forward_hook(lambda module, given, out: out * 64)
            try:
                shown = self.model(input_ids=ids, use_cache=False).logits.float()
                hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
                expected = head(hidden).float()
            finally:
                hook.remove()
        if shown.shape != expected.shape or (shown - expected).abs().max() > 0.05 * expected.abs().max():
            raise CannotPack("something follows its output layer (a scale or a soft cap)")

    def _check_separation(self, rows: Sequence[Rendered]) -> None:
        """Other tokens in the first row must leave the other rows' losses, and a window must have been asked for."""
        first, *others = rows
        changed = Rendered(first.ids[:SHARED_AT_LEAST] + first.ids[SHARED_AT_LEAST:][::-1], first.weights)
        mine, theirs = (pack([row, *others], self.device, few=self.few) for row in (first, changed))
        others_N = slice(1, None) if self._scorer else mine.owner_N > 0
        moved = (self._together(mine) - self._together(theirs))[others_N].abs().max().item()
        if not moved <= self.tolerance / 10:
            raise CannotPack(f"a row's tokens move another row's losses by {moved:.2g} nats")
        if _window(self.model.config.get_text_config()) and not any(
            getattr(module, "_attends_with", (0, None))[1] for module in self.model.modules()
        ):
            raise CannotPack("its sliding window is only in the mask")

    def _off(self, rows: Sequence[Rendered], expected: Tensor) -> float:
        """By how many nats a token packing changes the loss, with and without a common beginning."""
        found = [self._together(pack(rows, self.device, share, few=self.few)) for share in (True, False)]
        off = max((losses - expected).abs().mean().item() for losses in found)
        return off if math.isfinite(off) else math.inf
