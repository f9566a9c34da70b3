"""The engine that runs wherever the model was trained: transformers' own generation, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from tunesmith.conversation.render import Rendered
from tunesmith.inference.engine import Score, Tick
from tunesmith.models.load import load_model, load_tuned
from tunesmith.models.machine import Machine, reuse_buffers
from tunesmith.models.packed import PackedForward, packs
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
    """A model, with an adapter merged into it if one is given.

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

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: Sequence[int], tick: Tick
    ) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        longest_first = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while longest_first:
            width = len(prompts[longest_first[0]])
            count = max(1, min(BATCH_ROWS, BATCH_TOKENS // (width + max_new_tokens)))
            batch, longest_first = longest_first[:count], longest_first[count:]
            pad = stop_ids[0] if stop_ids else 0
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in batch])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])
            out = self._greedy(ids, mask, max_new_tokens, stop_ids)
            for i, row in zip(batch, out.tolist(), strict=True):
                answers[i] = _until(row[width:], stop_ids)
            tick(len(batch))
        return answers

    @torch.inference_mode()
    def stream(
        self, prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int], on_token: Callable[[int], None]
    ) -> list[int]:
        ids = torch.tensor([prompt])
        out = self._greedy(ids, torch.ones_like(ids), max_new_tokens, stop_ids, _Tap(on_token))
        return _until(out[0].tolist()[len(prompt) :], stop_ids)

    def _greedy(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        streamer: _Tap | None = None,
    ) -> torch.Tensor:
        # The model's own generation config may sample or penalise; a proof has to be greedy.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=stop_ids[0] if stop_ids else 0,
        )
        out: torch.Tensor = self.model.generate(
            input_ids=ids_BT.to(self.device), attention_mask=mask_BT.to(self.device), streamer=streamer
        )
        return out.cpu()

    @torch.no_grad()
    def score(self, rows: Sequence[Rendered], tick: Tick) -> list[Score]:
        try:
            forward = PackedForward(self.model, rows)
            sums = [0.0] * len(rows)
            counts = [0] * len(rows)
            for group in packs(range(len(rows)), rows, SCORE_TOKENS):
                batch = forward.pack([rows[i] for i in group])
                values = forward.nll(batch).double().tolist()
                for number, value in zip(batch.owner_N.tolist(), values, strict=True):
                    sums[group[number]] += value
                    counts[group[number]] += 1
                tick(len(group))
        finally:
            self.model.set_attn_implementation(self._attention)
        return [Score(s, c) for s, c in zip(sums, counts, strict=True)]


def _until(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]
