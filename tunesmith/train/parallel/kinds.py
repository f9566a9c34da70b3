"""The recipe's `train.parallel`: how several ranks share a model. Each has `over(ranks, step, weights)`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.section import Section

if TYPE_CHECKING:
    from tunesmith.train.parallel.alone import Alone, Step, Weights
    from tunesmith.train.ranks import Ranks


class Ddp(Section):
    """Every rank holds the whole model; gradients are added up (torch's DistributedDataParallel)."""

    kind: Literal["ddp"] = "ddp"
    bucket_mb: int = Field(25, ge=1)
    """Gradients that are sent at once, in MB."""

    @property
    def whole_here(self) -> bool:
        """Whether each rank has all weights between steps."""
        return True

    def over(self, ranks: Ranks, step: Step, weights: Weights) -> Alone:
        from tunesmith.train.parallel.ddp import Replicated

        return Replicated(ranks, step, weights, self.bucket_mb)


class Fsdp(Section):
    """Every rank holds a part of each layer's weights, gradients and optimizer state (torch's FSDP2, `fully_shard`)."""

    kind: Literal["fsdp"] = "fsdp"
    reshard: bool = True
    """Give a layer's gathered weights back after its forward pass, and gather them again for the backward pass."""

    @property
    def whole_here(self) -> bool:
        """Whether each rank has all weights between steps."""
        return False

    def over(self, ranks: Ranks, step: Step, weights: Weights) -> Alone:
        from tunesmith.train.parallel.fsdp import Sharded

        return Sharded(ranks, step, weights, self.reshard)


class Zero(Section):
    """Every rank holds a part of the optimizer's state, and more by stage (DeepSpeed's engine)."""

    kind: Literal["zero"] = "zero"
    stage: Literal[1, 2, 3] = 2
    """What is parted: 1 the optimizer's state, 2 gradients too, 3 weights too."""

    @property
    def whole_here(self) -> bool:
        """Whether each rank has all weights between steps."""
        return self.stage < 3

    def over(self, ranks: Ranks, step: Step, weights: Weights) -> Alone:
        from tunesmith.train.parallel.zero import Parted

        return Parted(ranks, step, weights, self.stage)
