"""Contrastive preference optimisation: pairs without a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.train.objectives.pairs import PairMethod, preferred

if TYPE_CHECKING:
    from torch import Tensor


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
