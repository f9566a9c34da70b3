"""The optimizers that a recipe can name, each with its own settings."""

from __future__ import annotations

import math
from abc import abstractmethod
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.errors import MachineError
from tunesmith.section import Section

if TYPE_CHECKING:
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]
Betas = tuple[float, float]


class OptimizerSection(Section):
    """What all have in common.

    Attributes:
        constant_rate: whether the rate must stay where the warm-up leaves it.
        state_per_weight: bytes of state that a weight costs.
        needs: a package that it comes from, and the extra that installs it.
        beside_adamw: the rate that it wants as a multiple of AdamW's; None where nobody has told one that holds.
    """

    constant_rate: ClassVar[bool] = False
    state_per_weight: ClassVar[float] = 8
    needs: ClassVar[tuple[str, str] | None] = None
    beside_adamw: ClassVar[float | None] = None

    @property
    def rate_beside_adamw(self) -> float | None:
        """`beside_adamw`, of the optimizer as it is set."""
        return self.beside_adamw

    @abstractmethod
    def build(self, groups: Groups, rate: float) -> Optimizer:
        """The optimizer over groups of weights.

        Args:
            groups: of `params`, with their `weight_decay`, their `share` of the rate, and `hidden`: whether they are
                matrices inside the decoder's layers.
            rate: the peak rate.
        """

    def check(self, device: str) -> None:
        """Raise MachineError where this optimizer can't run on `device`."""
        if self.needs and find_spec(self.needs[0]) is None:
            package, extra = self.needs
            raise MachineError(
                f"comes from {package}, which is not installed",
                where="train.optimizer",
                fix=f"Install it: pip install 'tunesmith[{extra}]'",
            )

    def state_bytes(self, groups: Groups) -> int:
        """Memory of its state over these groups."""
        return round(sum(self.state_of(tuple(w.shape), g["hidden"]) for g in groups for w in g["params"]))

    def state_of(self, shape: tuple[int, ...], hidden: bool) -> float:
        """Bytes of state of a weight."""
        del hidden
        return self.state_per_weight * math.prod(shape)


class AdamW(OptimizerSection):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101): torch's own."""

    kind: Literal["adamw"] = "adamw"
    beside_adamw: ClassVar[float | None] = 1.0
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    fused: bool = True
    """One kernel for all weights."""

    def build(self, groups: Groups, rate: float) -> Optimizer:
        import torch

        return torch.optim.AdamW(groups, lr=rate, betas=self.betas, eps=self.eps, fused=self.fused)


class Adafactor(OptimizerSection):
    """Second moments of rows and columns only: hardly any state (Shazeer and Stern 2018, arXiv:1804.04235)."""

    kind: Literal["adafactor"] = "adafactor"

    def build(self, groups: Groups, rate: float) -> Optimizer:
        import torch

        return torch.optim.Adafactor(groups, lr=rate)

    def state_of(self, shape: tuple[int, ...], hidden: bool) -> float:
        return 4 * sum(shape[-2:]) * math.prod(shape[:-2])


class Sgd(OptimizerSection):
    """Stochastic gradient descent; its weight decay is added to the gradient."""

    kind: Literal["sgd"] = "sgd"
    state_per_weight: ClassVar[float] = 4
    momentum: float = Field(0.9, ge=0, lt=1)
    """Share of the last step that is taken again."""
    nesterov: bool = False
    """Look ahead along the momentum."""

    def build(self, groups: Groups, rate: float) -> Optimizer:
        import torch

        return torch.optim.SGD(groups, lr=rate, momentum=self.momentum, nesterov=self.nesterov)


class Lion(OptimizerSection):
    """The sign of an averaged gradient (Chen et al. 2023, arXiv:2302.06675). Wants a rate 3 to 10 times lower than
    AdamW does."""

    kind: Literal["lion"] = "lion"
    state_per_weight: ClassVar[float] = 4
    beside_adamw: ClassVar[float | None] = 1 / 5  # the paper's section 5: 3 to 10 times smaller
    betas: Betas = (0.9, 0.99)
    """Decay rates of what is stepped along, and of what is remembered."""

    def build(self, groups: Groups, rate: float) -> Optimizer:
        from tunesmith.train.optimizers.lion import Lion

        return Lion(groups, rate, self.betas)


class Muon(OptimizerSection):
    """Orthogonalised momentum for the matrices inside the layers, AdamW for all else (Jordan et al. 2024; Liu et al.
    2025, arXiv:2502.16982): torch's own of both."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    """Share of the average that stays."""
    nesterov: bool = True
    """Look ahead along the momentum."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Of a matrix's step: as long as AdamW's would be, so that AdamW's rates fit; or as first published."""
    betas: Betas = (0.9, 0.999)
    """AdamW's decay rates."""

    def build(self, groups: Groups, rate: float) -> Optimizer:
        import torch

        from tunesmith.train.optimizers.together import Together

        matrices, others = ([g for g in groups if g["hidden"] is hidden] for hidden in (True, False))
        parts: list[Optimizer] = []
        if matrices:
            parts.append(
                torch.optim.Muon(
                    matrices, rate, momentum=self.momentum, nesterov=self.nesterov, adjust_lr_fn=self.scale
                )
            )
        if others:
            parts.append(torch.optim.AdamW(others, rate, self.betas, fused=True))
        return Together(parts)

    def state_of(self, shape: tuple[int, ...], hidden: bool) -> float:
        return (4 if hidden else 8) * math.prod(shape)

    @property
    def rate_beside_adamw(self) -> float | None:
        return 1.0 if self.scale == "match_rms_adamw" else None


class ScheduleFree(OptimizerSection):
    """AdamW that averages its own steps in place of a falling rate (Defazio et al. 2024, arXiv:2405.15682): the
    authors' package. The averages are what is validated, kept and saved; the rate stays after the warm-up."""

    kind: Literal["schedule_free"] = "schedule_free"
    needs: ClassVar[tuple[str, str] | None] = ("schedulefree", "optimizers")
    constant_rate: ClassVar[bool] = True
    beside_adamw: ClassVar[float | None] = 3.0  # the authors' README: 1 to 10 times larger
    betas: Betas = (0.9, 0.999)
    """How far gradients are taken towards the average, and the decay rate of the second moment."""
    r: float = Field(0.0, ge=0)
    """The average weighs step k by k to this power."""

    def build(self, groups: Groups, rate: float) -> Optimizer:
        from schedulefree import AdamWScheduleFree

        made: Optimizer = AdamWScheduleFree(groups, lr=rate, betas=self.betas, r=self.r)
        made.train()  # type: ignore[attr-defined]
        return made


class AdamW8bit(OptimizerSection):
    """AdamW with its moments in 8 bits, block by block, through bitsandbytes (Dettmers et al. 2022,
    arXiv:2110.02861)."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    beside_adamw: ClassVar[float | None] = 1.0
    needs: ClassVar[tuple[str, str] | None] = ("bitsandbytes", "bitsandbytes")
    state_per_weight: ClassVar[float] = 2 + 8 / 256
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two moments."""

    def build(self, groups: Groups, rate: float) -> Optimizer:
        from bitsandbytes.optim import AdamW8bit

        made: Optimizer = AdamW8bit(groups, lr=rate, betas=self.betas)
        return made


class PagedAdamW(OptimizerSection):
    """AdamW whose state moves to the computer's memory where the GPU's runs out, through bitsandbytes."""

    kind: Literal["paged_adamw"] = "paged_adamw"
    beside_adamw: ClassVar[float | None] = 1.0
    needs: ClassVar[tuple[str, str] | None] = ("bitsandbytes", "bitsandbytes")
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two moments."""
    bits: Literal[8, 32] = 8
    """Of the moments."""

    def check(self, device: str) -> None:
        if not device.startswith("cuda"):
            raise MachineError(
                "paged_adamw moves state between a GPU's memory and the computer's, and there is no GPU",
                where="train.optimizer",
                fix="Take adamw_8bit, which keeps a quarter of AdamW's state, or adamw.",
            )
        super().check(device)

    def build(self, groups: Groups, rate: float) -> Optimizer:
        from bitsandbytes import optim

        kind = optim.PagedAdamW8bit if self.bits == 8 else optim.PagedAdamW32bit
        made: Optimizer = kind(groups, lr=rate, betas=self.betas)
        return made

    def state_of(self, shape: tuple[int, ...], hidden: bool) -> float:
        return (2 + 8 / 256 if self.bits == 8 else 8) * math.prod(shape)


class GaLore(OptimizerSection):
    """AdamW in a low-rank view of each matrix's gradient (Zhao et al. 2024, arXiv:2403.03507), for training all
    weights with little state, through pytorch-optimizer."""

    kind: Literal["galore"] = "galore"
    needs: ClassVar[tuple[str, str] | None] = ("pytorch_optimizer", "optimizers")
    rank: int = Field(128, ge=1)
    """The view's inner size; matrices that are no larger are trained whole."""
    every: int = Field(200, ge=1)
    """Steps between new views."""
    scale: float = Field(0.25, gt=0)
    """Of a matrix's step."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the two moments."""

    def build(self, groups: Groups, rate: float) -> Optimizer:
        from tunesmith.train.optimizers.galore import GaLore

        return GaLore.over(groups, rate, self.betas, self.rank, self.every, self.scale)

    def state_of(self, shape: tuple[int, ...], hidden: bool) -> float:
        if not hidden or min(shape) <= self.rank:
            return 8 * math.prod(shape)
        return 4 * self.rank * (2 * max(shape) + min(shape))
