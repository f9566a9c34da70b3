"""Distillation: learning from another model's probabilities, or from its answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.train.objectives.method import Batch, Example, Loss
from tunesmith.train.objectives.sft import Sft

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.models.packed import PackedForward
    from tunesmith.models.resolve import ResolvedModel


class Distill(Sft):
    """Learn what a teacher says: its probabilities of every token of the rows' answers (a generalised Jensen-Shannon
    divergence, Agarwal et al. 2023, arXiv 2306.13649), or the answers that it gives itself."""

    kind: Literal["distill"] = "distill"  # type: ignore[assignment]
    teacher: str = Field(min_length=1)
    """The model to learn from, named as the base model is."""
    source: Literal["logits", "text"] = "logits"
    """The teacher's probabilities (it must have the base's vocabulary), or its greedy answers in place of the rows'."""
    beta: float = Field(0.0, ge=0, le=1)
    """0: forward KL (cover all that the teacher might say); 1: reverse KL (say what it surely would); between: JSD."""
    temperature: float = Field(1.0, gt=0)
    """By which both models' logits are divided."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the rows' own cross-entropy beside the divergence."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer of the teacher, where its text is learnt."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the teacher's weights; auto: what this machine is faster at."""

    @property
    def models(self) -> dict[str, str]:
        return {"teacher": self._teacher().identity}

    @property
    def figures(self) -> dict[str, bool]:
        return {"divergence": False} if self.source == "logits" else super().figures

    def reads_along(self) -> tuple[ResolvedModel, str] | None:
        from tunesmith.train.teacher import chosen

        return (self._teacher(), chosen(self.precision)) if self.source == "logits" else None

    def encode(self, rows: Sequence[Conversation], renderer: Renderer, max_length: int) -> Iterator[list[Example]]:
        if self.source == "text":
            from tunesmith.train.teacher import answers

            found = answers(self._teacher(), rows, min(self.max_new_tokens, max_length), self.precision)
            rows = [
                replace(row, messages=(*row.prompt, replace(row.messages[-1], content=answer)))
                for row, answer in zip(rows, found, strict=True)
            ]
        return super().encode(rows, renderer, max_length)

    def start(self, examples: Sequence[Example]) -> Any:
        """The teacher as a packed forward."""
        if self.source == "text":
            return None
        from tunesmith.train.teacher import forward_of

        return forward_of(self._teacher(), [example.sequences[0] for example in examples], self.precision)

    def suits(self, renderer: Renderer) -> None:
        if self.source == "text":
            return
        from tunesmith.models.load import load_renderer

        if load_renderer(self._teacher()).tokenizer.get_vocab() != renderer.tokenizer.get_vocab():
            raise ModelError(
                f"{self.teacher} has another vocabulary than the base model, so their probabilities can't be compared",
                where="train.method.teacher",
                fix="Learn from its answers instead: source: text. Or take a teacher of the base's family.",
            )

    def _teacher(self) -> ResolvedModel:
        from tunesmith.models.resolve import resolve
        from tunesmith.models.section import ModelSection

        return resolve(ModelSection(name=self.teacher))

    def loss(self, forward: PackedForward, batch: Batch) -> Loss:
        if self.source == "text":
            return super().loss(forward, batch)
        import torch

        teacher: PackedForward = batch.known
        rows = [sequence for example in batch.examples for sequence in example.sequences]
        with torch.no_grad():
            told_NE, to_told = teacher.predicting(teacher.pack(rows))
        said_ND, to_said = forward.predicting(batch.pack)
        weights_N = batch.pack.weights_N
        apart_N = divergence(said_ND, to_said, told_NE, to_told, self.beta, self.temperature)
        total = (apart_N * weights_N).sum()
        told = {"divergence": (total.item(), weights_N.sum().item())}
        if self.sft_weight:
            total = total + self.sft_weight * (forward.nll(batch.pack) * weights_N).sum()
        return Loss({"tokens": total}, told)


def divergence(
    said_ND: Tensor,
    to_said: Callable[[Tensor], Tensor],
    told_NE: Tensor,
    to_told: Callable[[Tensor], Tensor],
    beta: float,
    temperature: float,
) -> Tensor:
    """The generalised Jensen-Shannon divergence [N] in nats between two models' next tokens, the logits of a few tokens
    in memory at a time (they are computed again for the gradient).

    Args:
        said_ND, told_NE: states of the student and the teacher; `to_said` and `to_told` make logits of them.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    from tunesmith.models.head import tokens_at_once

    def chunk(said: Tensor, told: Tensor) -> Tensor:
        logits = [to_said(said).float() / temperature, to_told(told).float() / temperature]
        size = min(x.shape[-1] for x in logits)  # vocabularies are padded to different sizes
        student, teacher = (x[:, :size].log_softmax(-1) for x in logits)
        if beta == 0:
            return (teacher.exp() * (teacher - student)).sum(-1)
        if beta == 1:
            return (student.exp() * (student - teacher)).sum(-1)
        between = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
        parts = ((p.exp() * (p - between)).sum(-1) for p in (teacher, student))
        return beta * next(parts) + (1 - beta) * next(parts)

    size = tokens_at_once(getattr(to_said, "out_features", 0))
    pairs = zip(said_ND.split(size), told_NE.split(size), strict=True)
    return torch.cat([checkpoint(chunk, said, told, use_reentrant=False) for said, told in pairs])
