"""The terms that a recipe can name under `train.keep`."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tunesmith.section import Section

if TYPE_CHECKING:
    from tunesmith.train.keep.terms import Start, Term


class TermSection(Section):
    """What all have in common.

    Attributes:
        copies: how many numbers are kept for each trained weight.
    """

    copies: ClassVar[int] = 0

    def rows_seen(self, steps: int) -> int:
        """How many rows it takes gradients of, before and in so many steps."""
        del steps
        return 0

    @abstractmethod
    def begin(self, start: Start) -> Term:
        """The term, on a model that has taken no step."""


class L2(TermSection):
    """weight / 2 times the squared distance of what is trained from where it started (L2-SP, Li et al. 2018,
    arXiv:1802.01483)."""

    copies: ClassVar[int] = 1

    kind: Literal["l2"] = "l2"
    weight: float = Field(0.01, gt=0)
    """How much it counts beside the loss."""

    def begin(self, start: Start) -> Term:
        from tunesmith.train.keep.terms import L2ToStart

        return L2ToStart(start, self.weight)


class Ewc(TermSection):
    """As l2, but each weight is held as firmly as some general rows need it: by its empirical Fisher information on
    their answers (elastic weight consolidation, Kirkpatrick et al. 2017, arXiv:1612.00796)."""

    copies: ClassVar[int] = 2

    kind: Literal["ewc"] = "ewc"
    rows: str = Field(min_length=1)
    """A file of general rows, in any layout that is recognised; relative to the recipe."""
    weight: float = Field(100.0, gt=0)
    """How much it counts beside the loss."""
    sample: int = Field(256, ge=1)
    """So many of the rows are read, the first ones."""

    def rows_seen(self, steps: int) -> int:
        return self.sample

    def begin(self, start: Start) -> Term:
        from tunesmith.train.keep.terms import FisherToStart

        return FisherToStart(start, start.general[self.rows][: self.sample], self.weight)


class Kl(TermSection):
    """The divergence KL(start || now) per token on the answers of replay rows: the model may change, but not what it
    says there. With an adapter that starts as nothing, the start is the base itself. No second model is kept: what is
    kept are the last hidden states of those rows, computed once."""

    kind: Literal["kl"] = "kl"
    rows: str = Field(min_length=1)
    """A file of replay rows, in any layout that is recognised; relative to the recipe."""
    weight: float = Field(0.1, gt=0)
    """How much it counts beside the loss."""
    batch_size: int = Field(4, ge=1)
    """Replay rows in a step, drawn from the seed and the step's number."""

    def rows_seen(self, steps: int) -> int:
        return self.batch_size * steps

    def begin(self, start: Start) -> Term:
        from tunesmith.train.keep.terms import KlToStart

        return KlToStart(start, start.general[self.rows], self.weight, self.batch_size)
