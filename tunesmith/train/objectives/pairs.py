"""Methods that learn from pairs of a better and a worse ending. Their losses are functions of the endings'
log-probabilities; the prompt of a pair is computed once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

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


class Dpo(PairMethod):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): raise the better ending over the worse
    one, measured from where the model started."""

    kind: Literal["dpo"] = "dpo"
    form: Literal["sigmoid", "hinge", "ipo", "robust", "apo_zero", "apo_down"] = "sigmoid"
    """The loss: sigmoid (DPO), hinge (SLiC, 2305.10425), ipo (2310.12036), robust (2403.00409: unbiased where a share
    `label_smoothing` of the pairs is wrong), apo_zero, apo_down (2408.06266)."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The share of pairs thought to be the wrong way round (sigmoid: cDPO; robust)."""
    length_normalised: bool = False
    """Take the mean over an ending's tokens, not the sum, so that long endings weigh no more (ipo always does)."""

    @property
    def compares(self) -> bool:
        return True

    @property
    def averages(self) -> bool:
        return self.length_normalised or self.form == "ipo"

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        gap = self.beta * (chosen_P - rejected_P)
        better, worse = self.beta * chosen_P, self.beta * rejected_P
        smoothing = self.label_smoothing
        if self.form == "hinge":
            return (1 - gap).relu()
        if self.form == "ipo":
            return (chosen_P - rejected_P - 1 / (2 * self.beta)) ** 2
        if self.form == "robust":
            return (preferred(gap, 0) * (1 - smoothing) - smoothing * preferred(-gap, 0)) / (1 - 2 * smoothing)
        if self.form == "apo_zero":
            return 1 - better.sigmoid() + worse.sigmoid()
        if self.form == "apo_down":
            return better.sigmoid() + 1 - gap.sigmoid()
        return preferred(gap, smoothing)


class Cpo(PairMethod):
    """Contrastive preference optimisation (Xu et al. 2024, arXiv 2401.08417): DPO without a reference, held by the
    better ending's cross-entropy."""

    kind: Literal["cpo"] = "cpo"
    form: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of a pair."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The share of pairs thought to be the wrong way round."""
    sft_weight: float = Field(1.0, ge=0)

    @property
    def averages(self) -> bool:
        return self.form == "ipo"

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        gap = chosen_P - rejected_P
        if self.form == "hinge":
            return (1 - self.beta * gap).relu()
        if self.form == "ipo":
            return (gap - 1 / (2 * self.beta)) ** 2
        return preferred(self.beta * gap, self.label_smoothing)


class SimPo(PairMethod):
    """Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734): mean log-probabilities, no reference, and a
    gap to be reached."""

    averaged = True

    kind: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    gamma: float = Field(1.0, ge=0)
    """The gap between the rewards to be reached."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The share of pairs thought to be the wrong way round."""

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return preferred(self.beta * (chosen_P - rejected_P) - self.gamma, self.label_smoothing)


class Orpo(PairMethod):
    """Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691): the better ending's cross-entropy with a
    penalty on the odds of the worse one; no reference."""

    averaged = True

    kind: Literal["orpo"] = "orpo"
    sft_weight: float = Field(1.0, ge=0)
    """Weight of the better ending's cross-entropy (per token); 1 in the paper."""

    def pair_loss(self, chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        import torch
        import torch.nn.functional as F

        odds = (chosen_P - rejected_P) - (
            torch.log1p(-chosen_P.exp().clamp(max=1 - 1e-6)) - torch.log1p(-rejected_P.exp().clamp(max=1 - 1e-6))
        )
        return -self.beta * F.logsigmoid(odds)
