"""Simple preference optimisation: pairs by mean log-probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.train.objectives.pairs import PairMethod, preferred

if TYPE_CHECKING:
    from torch import Tensor


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
