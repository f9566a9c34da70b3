"""The engine that runs wherever the model was trained: on transformers' models, with our own batched decoding where
it gives what the model's own forward gives, and transformers' generation elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from tunesmith.conversation.render import Rendered
from tunesmith.inference.decode import Decoder, Noise
from tunesmith.inference.engine import Sampling, Score, Tick
from tunesmith.models.attention import CannotPack
from tunesmith.models.load import load_model, load_tuned
from tunesmith.models.machine import Machine, reuse_buffers
from tunesmith.models.packed import PackedForward
from tunesmith.models.packs import by_prompt, packs
from tunesmith.models.resolve import ResolvedModel

BATCH_ROWS, BATCH_TOKENS = 64, 32_768  # of a batch that is generated at once
SCORE_TOKENS = 2048


class _Tap:
    """What transformers calls a streamer: hands on each new token of a single answer."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token, self._prompt_seen = on_token, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._on_token(int(value))
        self._prompt_seen = True

    def end(self) -> None:
        pass


class TransformersEngine:
    """A model, with an adapter merged into it, or on top of it where that can't be, if one is given.

    Args:
        precision: of the weights; the machine's faster one if None.
    """

    def __init__(
        self,
        model: ResolvedModel,
        machine: Machine,
        adapter: Path | None = None,
        precision: str | None = None,
    ) -> None:
        reuse_buffers()
        dtype = getattr(torch, precision or machine.precision)
        self.device = machine.device
        loaded = load_tuned(model, adapter, dtype, self.device) if adapter else load_model(model, dtype, self.device)
        self.model: Any = loaded
        self._attention = loaded.config._attn_implementation
        self._forward: PackedForward | None = None
        self._decoder: Decoder | None = None

    @classmethod
    def over(cls, forward: PackedForward) -> TransformersEngine:
        """An engine on a model that is in memory already (in training, say), as it is now; it is left as it was."""
        engine = cls.__new__(cls)
        engine.device, engine.model = str(forward.device), forward.whole
        engine._attention, engine._forward, engine._decoder = forward.attention, forward, None
        with contextlib.suppress(CannotPack):
            engine._decoder = Decoder(forward)
        return engine

    @property
    def _virtual(self) -> list[int]:
        """Ids of the virtual tokens that every row begins with."""
        found: list[int] = getattr(self.model, "virtual_ids", [])
        return found

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        tick: Tick,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        if not prompts:
            return answers
        with self._packed([Rendered(ids, [0.0] * len(ids)) for ids in prompts]):
            longest = max(map(len, prompts)) + max_new_tokens
            if self._decoder and longest <= self._decoder.forward.longest:
                for batch in self._decoder.batches(prompts, max_new_tokens):
                    asked = [prompts[i] for i in batch]
                    noise = Noise(sampling, asked) if sampling else None
                    found = self._decoder.greedy(asked, max_new_tokens, stop_ids, tick, noise)
                    for i, ids in zip(batch, found, strict=True):
                        answers[i] = _until(ids, stop_ids)
                return answers
        prompts = [self._virtual + ids for ids in prompts]
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while longest_first:
            width = len(prompts[longest_first[0]])
            count = max(1, min(BATCH_ROWS, BATCH_TOKENS // (width + max_new_tokens)))
            batch, longest_first = longest_first[:count], longest_first[count:]
            pad = stop_ids[0] if stop_ids else 0
            ids_BT = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch])
            mask_BT = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            noise = Noise(sampling, [prompts[i] for i in batch]) if sampling else None
            out = self._greedy(ids_BT, mask_BT, max_new_tokens, stop_ids, noise=noise)
            for i, row in zip(batch, out.tolist(), strict=True):
                answers[i] = _until(row[width:], stop_ids)
            tick(len(batch))
        return answers

    @torch.inference_mode()
    def stream(
        self, prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int], on_token: Callable[[int], None]
    ) -> list[int]:
        ids = torch.tensor([self._virtual + prompt])
        out = self._greedy(ids, torch.ones_like(ids), max_new_tokens, stop_ids, _Tap(on_token))
        return _until(out[0].tolist()[ids.shape[1] :], stop_ids)

    def _greedy(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        streamer: _Tap | None = None,
        noise: Noise | None = None,
    ) -> torch.Tensor:
        # The model's own generation config may sample or penalise; a proof has to be greedy.
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
        )
        for model in {self.model, getattr(self.model, "base_model", self.model)}:  # PEFT asks both
            model.generation_config = config
        out: torch.Tensor = self.model.generate(
            input_ids=ids_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            streamer=streamer,
            logits_processor=[lambda _, scores: noise(scores, range(len(scores)))] if noise else None,
        )
        return out.cpu()

    @torch.inference_mode()
    def score(self, rows: Sequence[Rendered], tick: Tick) -> list[Score]:
        sums, counts = [0.0] * len(rows), [0] * len(rows)
        with self._packed(rows) as forward:
            groups = by_prompt(rows, SCORE_TOKENS)
            for chosen in packs(range(len(groups)), [[rows[i] for i in group] for group in groups], SCORE_TOKENS):
                group = [i for number in chosen for i in groups[number]]
                batch = forward.pack([rows[i] for i in group], [len(groups[number]) for number in chosen])
                values = forward.nll(batch).double().tolist()
                for number, value in zip(batch.owner_N.tolist(), values, strict=True):
                    sums[group[number]] += value
                    counts[group[number]] += 1
                tick(len(group))
        return [Score(s, c) for s, c in zip(sums, counts, strict=True)]

    @torch.inference_mode()
    def embed(self, rows: Sequence[list[int]], tick: Tick) -> Any:
        with self._packed([Rendered(ids, [0.0] * len(ids)) for ids in rows]) as forward:
            return embedded(forward, rows, SCORE_TOKENS, tick)

    @torch.inference_mode()
    def likeliest(self, rows: Sequence[Rendered], at: Sequence[Any] | None, k: int, tick: Tick) -> list[Any]:
        found = []
        for number, row in enumerate(rows):
            places = [i - 1 for i, weight in enumerate(row.weights) if weight and i]
            ids = torch.tensor([row.ids], device=self.device)
            logits = self.model(input_ids=ids, use_cache=False).logits[0, places]
            likely = logits.float().log_softmax(-1)
            if at is None:
                values, taken = likely.topk(min(k, likely.shape[-1]), -1)
            else:
                taken = torch.as_tensor(at[number], device=self.device, dtype=torch.long)
                values = likely.gather(-1, taken)
            found.append((taken.cpu().numpy(), values.cpu().numpy()))
            tick(1)
        return found

    @contextlib.contextmanager
    def _packed(self, rows: Sequence[Rendered]) -> Iterator[PackedForward]:
        """The model's packed forward, made with the first rows it sees; its attention is the model's own again
        outside."""
        try:
            if self._forward is None:
                self._forward = PackedForward(self.model, rows)
                with contextlib.suppress(CannotPack):
                    self._decoder = Decoder(self._forward)
            self.model.set_attn_implementation(self._forward.attention)
            yield self._forward
        finally:
            self.model.set_attn_implementation(self._attention)


def embedded(forward: PackedForward, rows: Sequence[list[int]], capacity: int, tick: Tick) -> Any:
    """Rows' embeddings, numpy [R, D]: the mean of their last states."""
    rendered = [Rendered(ids, [0.0] * len(ids)) for ids in rows]
    found: dict[int, Any] = {}
    for group in packs(range(len(rows)), [(row,) for row in rendered], capacity):
        vectors_RD = forward.means(forward.pack([rendered[i] for i in group])).cpu().numpy()
        found |= dict(zip(group, vectors_RD, strict=True))
        tick(len(group))
    return np.stack([found[i] for i in range(len(rows))])


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
