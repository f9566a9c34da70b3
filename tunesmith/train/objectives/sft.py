"""Supervised fine-tuning: the cross-entropy of the assistant's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.models.packed import Pack, PackedForward


class Sft(Section):
    """Learn to give the answers of the training rows."""

    kind: Literal["sft"] = "sft"
    loss_on: Literal["assistant", "last"] = "assistant"
    """Which answers carry loss: every assistant's turn, or only a row's last one."""

    def encode(self, row: Conversation, renderer: Renderer) -> Rendered:
        return renderer.render(row, only_last=self.loss_on == "last")

    def size(self, rendered: Rendered) -> float:
        """A step's loss is its sum over tokens divided by the step's total weight, so that a token counts
        the same in whatever batch it comes."""
        return sum(rendered.weights)

    def loss(self, forward: PackedForward, batch: Pack) -> Tensor:
        """Weighted sum over tokens of -log p(token | what precedes it), in nats."""
        return (forward.nll(batch) * batch.weights_N).sum()
