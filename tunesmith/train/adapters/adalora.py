"""AdaLoRA: LoRA whose rank moves, while it trains, from layers that need little to those that need more."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.errors import ModelError
from tunesmith.train.adapters.peft_adapter import RankedAdapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.conversation.render import Rendered

UNKNOWN = 10**9  # steps, until the run says how many there are
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # PEFT's names: how much each weight matters, and how sure that is


class AdaLora(RankedAdapter):
    """W + (alpha / rank) B E A with a diagonal E, whose least useful entries are set to zero step by step (Zhang et
    al. 2023, arXiv:2303.10512). `rank` is the mean that is left of `start_rank`."""

    resumes: ClassVar[bool] = False  # its ranks have fallen, and what was left out is gone

    kind: Literal["adalora"] = "adalora"
    rank: int = Field(8, ge=1)
    """The mean rank at the end."""
    start_rank: int | None = Field(None, ge=1)
    """Every layer's rank at the start; half as much again as `rank` if not given."""
    warm: float = Field(0.1, ge=0, lt=1)
    """Share of the steps before ranks begin to fall."""
    settled: float = Field(0.4, ge=0, lt=1)
    """Share of the steps, at the end, in which ranks stay."""
    every: int = Field(1, ge=1)
    """Steps between two rounds of letting ranks fall."""
    orthogonal: float = Field(0.5, ge=0)
    """Weight of ||A A^T - 1|| + ||B^T B - 1|| in what is minimised; the loss that is shown is without it."""

    @property
    def first_rank(self) -> int:
        return self.start_rank or math.ceil(1.5 * self.rank)

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import AdaLoraConfig

        if self.first_rank < self.rank:
            raise ModelError(
                f"is {self.first_rank}, less than rank, {self.rank}",
                where="train.adapter.start_rank",
                fix="Ranks only fall: start higher.",
            )
        return AdaLoraConfig(
            init_r=self.first_rank,
            target_r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.modules(model),
            deltaT=self.every,
            orth_reg_weight=self.orthogonal,
            total_step=UNKNOWN,
            task_type="CAUSAL_LM",
        )

    def attach(self, model: PreTrainedModel) -> PeftModel:
        adapted = super().attach(model)
        for name, parameter in adapted.named_parameters():
            if ".ranknum" in name:  # a count, which PEFT keeps as a parameter
                parameter.requires_grad_(False)
        return adapted

    def begin(self, model: Any, rows: Sequence[Rendered], steps: int) -> None:
        config = model.peft_config["default"]
        config.total_step = steps
        config.tinit, config.tfinal = round(self.warm * steps), round(self.settled * steps)
        if config.tinit >= steps - config.tfinal:
            raise ModelError(
                f"of {steps} steps none is left between warm, {self.warm}, and settled, {self.settled}",
                where="train.adapter",
                fix="Lower one of them, or train for more steps.",
            )

    def regularise(self, model: Any) -> None:
        import torch

        if not self.orthogonal:
            return
        found = [
            p @ p.T if "lora_A" in name else p.T @ p
            for name, p in model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]
        off = torch.stack([torch.linalg.norm(square - torch.eye(len(square)).to(square)) for square in found])
        (self.orthogonal * off.mean()).backward()

    def after_step(self, model: Any, step: int) -> None:
        model.base_model.update_and_allocate(step)

    def state(self, model: Any) -> dict[str, Tensor]:
        import torch

        tuner = model.base_model
        kept = {f"{kind}/{n}": x for kind in AVERAGES for n, x in getattr(tuner.rankallocator, kind).items()}
        pattern = json.dumps(model.peft_config["default"].rank_pattern).encode()
        return kept | {"ranks": torch.frombuffer(bytearray(pattern), dtype=torch.uint8)}

    def restore(self, model: Any, state: dict[str, Tensor]) -> None:
        allocator = model.base_model.rankallocator
        for kind in AVERAGES:
            setattr(allocator, kind, {n.partition("/")[2]: x for n, x in state.items() if n.startswith(f"{kind}/")})
        model.peft_config["default"].rank_pattern = json.loads(bytes(state["ranks"].tolist()).decode())
