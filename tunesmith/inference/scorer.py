"""A model whose head tells classes apart, as something to ask: its answer is the likeliest class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.errors import ModelError
from tunesmith.inference.engine import Sampling, Score, Tick
from tunesmith.inference.subject import Ask, Reply, Row
from tunesmith.models.load import classes_of, load_tuned
from tunesmith.models.machine import Machine, reuse_buffers
from tunesmith.models.packed import PackedForward
from tunesmith.models.packs import packs

if TYPE_CHECKING:
    from tunesmith.models.resolve import ResolvedModel

TOKENS = 2048  # in one forward pass
NEVER = 100.0  # nats, of a class that the head does not have


class Scorer:
    """What classify or reward trained.

    Args:
        tuned: the adapter's or the whole model's folder, with its classes.
    """

    def __init__(self, name: str, model: ResolvedModel, machine: Machine, tuned: Path, renderer: Renderer) -> None:
        reuse_buffers()
        self.name, self.renderer, self.classes = name, renderer, classes_of(tuned)
        self._model = load_tuned(model, tuned, getattr(torch, machine.precision), machine.device)
        self._forward: PackedForward | None = None

    def answers(
        self, prompts: Sequence[Ask], limit: int, sampling: Sampling | None, tick: Tick
    ) -> Iterator[tuple[int, Reply]]:
        """The likeliest class of each prompt, in whatever order."""
        if len(self.classes) < 2:
            raise ModelError(
                "scores answers and gives none", where=self.name, fix="Take the metric preference: goal.metric."
            )
        scores_RK = self.scores([self.renderer.prompt(p.messages, p.tools) for p in prompts], tick)
        for number, best in enumerate(scores_RK.argmax(-1).tolist()):
            yield number, Reply(self.classes[best], len(self._tokens(self.classes[best])))

    def likelihoods(self, rows: Sequence[Row], tick: Tick) -> Iterator[tuple[int, Score]]:
        """-log p of each row's class, over as many tokens as its name has; or, of a reward model, minus its score."""
        conversations = [row for row in rows if isinstance(row, Conversation)]
        if len(conversations) < len(rows):
            raise ModelError("scores conversations only", where=self.name, fix="Ask a language model.")
        if len(self.classes) < 2:
            found = self.scores([self.renderer.render(row).ids for row in conversations], tick)
            yield from ((i, Score(-value, 1)) for i, value in enumerate(found[:, 0].tolist()))
            return
        prompts = [self.renderer.prompt(row.prompt, row.tools) for row in conversations]
        likely_RK = self.scores(prompts, tick).log_softmax(-1)
        for number, row in enumerate(conversations):
            answer = row.answer.strip()
            known = answer in self.classes
            nll = -likely_RK[number, self.classes.index(answer)].item() if known else NEVER
            yield number, Score(nll, len(self._tokens(answer)) + 1)

    def stream(
        self, prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int], on_token: Callable[[int], None]
    ) -> list[int]:
        """The likeliest class, a token at a time."""
        best = int(self.scores([prompt], lambda by: None).argmax())
        ids = self._tokens(self.classes[best])
        for token in ids:
            on_token(token)
        return ids

    @torch.inference_mode()
    def scores(self, rows: Sequence[list[int]], tick: Tick) -> torch.Tensor:
        """Each row's scores [R, K] at its last token."""
        rendered = [Rendered(ids, [0.0] * (len(ids) - 1) + [1.0]) for ids in rows]
        self._forward = self._forward or PackedForward(self._model, rendered)
        found: dict[int, Any] = {}
        for group in packs(range(len(rows)), [(row,) for row in rendered], TOKENS):
            scores_RK = self._forward.scores(self._forward.pack([rendered[i] for i in group]))
            found |= dict(zip(group, scores_RK.cpu(), strict=True))
            tick(len(group))
        return torch.stack([found[i] for i in range(len(rows))])

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
