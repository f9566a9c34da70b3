"""Odds ratio preference optimisation: fine-tuning that also learns from the worse ending."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.train.objectives.pairs import PairMethod

if TYPE_CHECKING:
    from torch import Tensor


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
