"""Supervised fine-tuning: the cross-entropy of the assistant's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.train.objectives.method import Batch, Example, Loss, Method

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.models.packed import PackedForward


class Sft(Method):
    """Learn to give the answers of the training rows."""

    kind: Literal["sft"] = "sft"
    loss_on: Literal["assistant", "last"] = "assistant"
    """Which answers carry loss: every assistant's turn, or only a row's last one."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of each target that is given to all tokens alike, in training (Szegedy et al. 2016, arXiv:1512.00567)."""

    accuracy: bool = False
    """Also tell which share of the answers' tokens is what the model finds likeliest: `token_accuracy` in the
    metrics."""

    @property
    def figures(self) -> dict[str, bool]:
        return {"token_accuracy": True} if self.accuracy else {}

    def encode(self, rows: Sequence[Conversation], renderer: Renderer, max_length: int) -> Iterator[list[Example]]:
        for row in rows:
            yield [Example(row.id, (renderer.render(row, only_last=self.loss_on == "last"),))]

    def sizes(self, example: Example) -> dict[str, float]:
        """A step's loss is its sum over tokens divided by the step's total weight, so that a token counts
        the same in whatever batch it comes."""
        return {"tokens": sum(example.sequences[0].weights)}

    def loss(self, forward: PackedForward, batch: Batch) -> Loss:
        """Weighted sum over tokens of -log p(token | what precedes it), in nats."""
        smoothing = self.label_smoothing if forward.model.training else 0.0
        hits: list[Tensor] | None = [] if self.accuracy else None
        losses_N = forward.nll(batch.pack, smoothing, hits)
        told = {"token_accuracy": (_count(hits), float(len(losses_N)))} if hits else {}
        return Loss({"tokens": (losses_N * batch.pack.weights_N).sum()}, told)


def _count(hits: list[Tensor]) -> float:
    return float(sum(hit.sum().item() for hit in hits))
