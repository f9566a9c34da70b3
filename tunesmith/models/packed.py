"""Many rows in one forward pass, none seeing another, and the loss only where a token carries it.

Rows lie end to end in one sequence without padding; positions restart with each row, and attention is
computed row by row, so that packing changes no number but the time. What all rows of a pack begin with (a
system prompt, as a rule), or the rows that belong together (the prompt of two answers), is computed once: every
row attends to it, and its gradient is the sum of theirs.
Logits are made only for the tokens that carry loss, a chunk at a time, so that memory does not grow with the
vocabulary.

Any decoder that takes its attention from transformers' attention interface can be run like this, and Falcon. For the
others (and for whatever `PackedForward` finds to give another loss), rows go through the model one by one.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.conversation.render import Rendered
from tunesmith.errors import ModelError, first_line
from tunesmith.models.activations import recompute_layers, waiting
from tunesmith.models.attention import CannotPack, laid_out, packed_attention
from tunesmith.models.cuda import choose_attention, liger_there
from tunesmith.models.falcon import leave_packs, take_packs
from tunesmith.models.fused import fuse, unfuse
from tunesmith.models.head import head_nll
from tunesmith.models.packs import SHARED_AT_LEAST, Pack, pack
from tunesmith.models.pieces import compile_pieces
from tunesmith.models.shapes import LOSSES, few_shapes
from tunesmith.models.ways import Ways

ATTENTION = "tunesmith_packed"
# What a model that can't take what it is given here may raise.
REFUSALS = (AttributeError, TypeError, ValueError, RuntimeError, LookupError, AssertionError)
COARSE = 0.02  # of a loss: what bfloat16's own rounding moves it by, up to 1% on rows that make no sense


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
        self._head: Any = torch.nn.Identity()  # what makes logits of what `_apart` gives
        self._check()
        self.why += f"; not compiled: {failed}" if failed else ""
        if self.ways.activations != "keep":
            self._again = recompute_layers(self.model)

    def undo(self) -> None:
        """Leave the model as it was found."""
        unfuse(self.model)
        leave_packs(self.model)
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
            return self._apart(batch), self._head

    def scores(self, batch: Pack) -> Tensor:
        """The scores [R, K] that a model with a head of K classes gives each of the pack's rows at its end."""
        head = self.model.score
        *_, last = head.parameters()  # PEFT keeps the head that it copied before the one that computes
        found: Tensor = head(self._ends(batch).to(last.dtype)).float()
        return found

    def means(self, batch: Pack) -> Tensor:
        """The mean [R, D] of the last states of each of the pack's rows: its embedding."""
        if self._can_pack(batch):
            hidden = self._hidden(batch, torch.arange(len(batch.ids_T), device=self.device)).float()
            rows = [
                (hidden[at : at + before], hidden[start : start + own]) for start, own, at, before in batch.layout.rows
            ]
            return torch.stack([torch.cat(parts).mean(0) for parts in rows])
        with self._own_attention():
            alone = (batch.ids_T[row.start : row.start + row.length][None] for row in batch.layout.rows)
            states = (self.backbone(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in alone)
            return torch.stack([row.float().mean(0) for row in states])

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
        """The pack's losses; or its rows' states where the model has no language head."""
        if self._scorer:
            return self._ends(batch).float()
        before_N, to_N = batch.before_N, batch.ids_T[batch.places_N]
        filling = -len(to_N) % LOSSES if batch.layout.few else 0
        if filling:
            before_N, to_N = F.pad(before_N, (0, filling)), F.pad(to_N, (0, filling))
        loss_N = head_nll(self._hidden(batch, before_N), self.model.get_output_embeddings(), to_N, smoothing, hits)
        if hits and filling:
            hits[-1] = hits[-1][:-filling]
        return loss_N[: len(batch.places_N)]

    def _one_by_one(self, batch: Pack, smoothing: float = 0.0, hits: list[Tensor] | None = None) -> Tensor:
        if self._scorer:
            return self._ends_apart(batch).float()
        with self._own_attention(), waiting(self.offload, self.device):
            states = self._apart(batch)
        return head_nll(states, self._head, batch.ids_T[batch.places_N], smoothing, hits)

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

    def _apart(self, batch: Pack) -> Tensor:
        """Of each row alone, the states [N, D] that predict its weighted tokens; or their logits [N, V], where those
        are not the output layer's alone."""
        own = not isinstance(self._head, torch.nn.Identity)
        found = []
        for number, (start, length, _, _) in enumerate(batch.layout.rows):
            mine = batch.owner_N == number
            if mine.any():
                ids = batch.ids_T[start : start + length][None]
                given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
                out = self.backbone(**given).last_hidden_state if own else self.whole(**given).logits
                found.append(out[0, -length:][batch.before_N[mine] - start])
        return torch.cat(found)

    @torch.no_grad()
    def _check(self) -> None:
        """Go packed, with what can be fused, as far as that gives the losses that rows have one by one."""
        start = SHARED_AT_LEAST
        probe = [Rendered(r.ids, [0.0] * start + [1.0] * (len(r) - start)) for r in self.probe]
        training = self.model.training
        self.model.eval()
        try:
            alone = pack(probe, self.device, share=False)
            expected = self._read(alone)
            # States, which a head of classes reads, are told in units of how far they spread: about as large as nats.
            unit = expected.std().item() if self._scorer else 1.0
            allowed = self.tolerance
            if self._coarse:
                allowed += COARSE * expected.abs().mean().item() / unit
            more = "" if self._scorer or self.prefixed else self._take_head(alone, expected, allowed)
            if self.prefixed:
                raise CannotPack("trained keys and values lie before each row")
            from transformers import AttentionInterface

            AttentionInterface.register(ATTENTION, packed_attention)
            self.model.set_attn_implementation(ATTENTION)
            if not self.ways.packing:
                raise CannotPack("train.speed.packing is off")
            if self.model.config._attn_implementation != ATTENTION and not take_packs(self.model):
                raise CannotPack("this architecture does not use transformers' attention interface")
            if any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules()):
                raise CannotPack("its layers are computed again in the backward pass")
            if more:
                raise CannotPack(more)
            liger = liger_there(self.ways.liger, str(self.device))
            counts: Counter[str] = Counter()
            if self.ways.fused:
                counts = fuse(self.model, lambda: self._together(pack(probe, self.device)), liger)
            if self._off(probe, expected, unit) > allowed:
                unfuse(self.model)
                counts.clear()
                off = self._off(probe, expected, unit)
                if off > allowed:
                    raise CannotPack(f"packed losses are off by {off:.2g} nats a token")
            self._check_separation(probe, unit)
            told = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
            self.why += f"; fused: {told}" if told else ""
        except torch.OutOfMemoryError:
            raise
        except (CannotPack, *REFUSALS) as error:
            unfuse(self.model)
            leave_packs(self.model)
            self.packed, self.why = False, f"one row at a time: {error}"
            self.model.set_attn_implementation(self._slow_attention)
        finally:
            self.model.train(training)

    def _read(self, alone: Pack) -> Tensor:
        """The losses of rows one by one, as the whole model gives them."""
        try:
            return self._one_by_one(alone)
        except torch.OutOfMemoryError:
            raise
        except REFUSALS as error:
            raise ModelError(
                f"architecture {self.model.config.model_type} can't read tokens alone ({first_line(error)})",
                where="model.name",
                fix="Take a decoder that needs nothing but text.",
            ) from error

    def _take_head(self, alone: Pack, expected: Tensor, allowed: float) -> str:
        """Make logits by the output layer itself, a chunk of tokens at a time; or why they are not its alone."""
        try:
            self._check_head(alone.ids_T[: alone.layout.rows[0].length])
            self._head = self.model.get_output_embeddings()
            off = (self._one_by_one(alone) - expected).abs().mean().item()
            if not off <= allowed:
                raise CannotPack(f"losses by its output layer are off by {off:.2g} nats a token")
        except torch.OutOfMemoryError:
            raise
        except (CannotPack, *REFUSALS) as error:
            self._head = torch.nn.Identity()
            return str(error)
        return ""

    def _check_head(self, ids_T: Tensor) -> None:
        """The logits must be the output layer's own: no scale and no soft cap after it, which small ones hide."""
        ids, head = ids_T[None], self.model.get_output_embeddings()
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

    def _check_separation(self, rows: Sequence[Rendered], unit: float) -> None:
        """Other tokens in the first row must leave the other rows' losses, and a window must have been asked for."""
        first, *others = rows
        changed = Rendered(first.ids[:SHARED_AT_LEAST] + first.ids[SHARED_AT_LEAST:][::-1], first.weights)
        mine, theirs = (pack([row, *others], self.device, few=self.few) for row in (first, changed))
        others_N = slice(1, None) if self._scorer else mine.owner_N > 0
        moved = (self._together(mine) - self._together(theirs))[others_N].abs().max().item() / unit
        if not moved <= self.tolerance / 10:
            raise CannotPack(f"a row's tokens move another row's losses by {moved:.2g} nats")
        if _window(self.model.config.get_text_config()) and not any(
            getattr(module, "_attends_with", (0, None))[1] for module in self.model.modules()
        ):
            raise CannotPack("its sliding window is only in the mask")

    def _off(self, rows: Sequence[Rendered], expected: Tensor, unit: float) -> float:
        """By how many nats a token packing changes the loss, with and without a common beginning."""
        found = [self._together(pack(rows, self.device, share, few=self.few)) for share in (True, False)]
        off = max((losses - expected).abs().mean().item() for losses in found) / unit
        return off if math.isfinite(off) else math.inf
