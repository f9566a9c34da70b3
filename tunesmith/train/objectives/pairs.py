"""What methods have in common that learn from pairs of a better and a worse ending. Their losses are functions of the
endings' log-probabilities; the prompt of a pair is computed once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.train.objectives.method import Batch, Example, Loss, Method, log_probs

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.models.packed import PackedForward


class PairMethod(Method):
    """A loss of pairs: `pair_loss` of the endings' scores, and where it is asked for, the better ending's
    cross-entropy."""

    takes = "preference"
    averaged: ClassVar[bool] = False
    """Whether an ending's score is the mean over its tokens instead of the sum."""

    beta: float = Field(0.1, gt=0)
    """How strongly scores count: the reward is beta times the score."""
    sft_weight: float = Field(0.0, ge=0)
    """Weight of the better ending's cross-entropy (per token) beside the pairs' loss."""

    @property
    def figures(self) -> dict[str, bool]:
        return {"rewards_accuracy": True, "rewards_margin": True, "rewards_chosen": True, "rewards_rejected": False}

    @abstractmethod
    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        """Each pair's loss [P] from its endings' scores."""

    def encode(self, rows: Sequence[Conversation], renderer: Renderer, max_length: int) -> Iterator[list[Example]]:
        for row in rows:
            endings = tuple(renderer.render(conversation) for conversation in row.conversations)
            yield [Example(row.id, endings)]

    def sizes(self, example: Example) -> dict[str, float]:
        return {"pairs": 1.0, "tokens": float(example.sequences[0].trained)}

    def loss(self, forward: PackedForward, batch: Batch) -> Loss:
        import torch

        found = log_probs(forward, batch.pack)
        averaged = self.averages
        scores_P2 = torch.stack([x.mean() if averaged else x.sum() for x in found]).view(-1, 2)
        if self.compares:
            lengths = [[r.trained if averaged else 1 for r in e.sequences] for e in batch.examples]
            before_P2 = scores_P2.new_tensor([e.reference for e in batch.examples])
            scores_P2 = scores_P2 - before_P2 / scores_P2.new_tensor(lengths)
        chosen_P, rejected_P = scores_P2.unbind(1)
        losses_P = self.pair_loss(chosen_P, rejected_P)
        terms = {"pairs": losses_P.sum()}
        if self.sft_weight:
            terms["tokens"] = -self.sft_weight * torch.stack([x.sum() for x in found[::2]]).sum()
        return Loss(terms, self.rewards(chosen_P.detach(), rejected_P.detach()))

    @property
    def averages(self) -> bool:
        return self.averaged

    def rewards(self, chosen_P: Tensor, rejected_P: Tensor) -> dict[str, tuple[float, float]]:
        """What is told of the pairs: the endings' rewards, and how often the better one has the higher."""
        told = {
            "rewards_chosen": self.beta * chosen_P,
            "rewards_rejected": self.beta * rejected_P,
            "rewards_margin": self.beta * (chosen_P - rejected_P),
            "rewards_accuracy": (chosen_P > rejected_P).float(),
        }
        return {name: (values_P.sum().item(), len(values_P)) for name, values_P in told.items()}


def preferred(gap: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(gap), where a share `smoothing` of the pairs is thought to be the wrong way round (cDPO)."""
    import torch.nn.functional as F

    return -(1 - smoothing) * F.logsigmoid(gap) - smoothing * F.logsigmoid(-gap)
