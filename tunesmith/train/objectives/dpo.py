"""Direct preference optimisation: pairs against where the model started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.train.objectives.pairs import PairMethod, preferred

if TYPE_CHECKING:
    from torch import Tensor


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
