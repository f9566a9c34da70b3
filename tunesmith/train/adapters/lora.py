"""LoRA: a low-rank update beside each frozen product (Hu et al. 2021, arXiv:2106.09685), through PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.errors import ModelError
from tunesmith.section import Section

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Lora(Section):
    """Train B and A of W + (alpha / rank) B A, in float32, and leave W as it is."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(16, ge=1)
    """Columns of B, rows of A."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the update's input."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get an update, or all linear ones but the output layer."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """Put the update's layers into the model (in place) and freeze everything else.

        Raises:
            ModelError: no layer has one of the names in `targets`; lists those there are.
        """
        import torch
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )
        try:
            tuned = get_peft_model(model, config)
        except ValueError as error:
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
            raise ModelError(
                f"no layer fits {self.targets} ({str(error).splitlines()[0][:200]})",
                where="train.adapter.targets",
                fix=f"This model's linear layers are called: {', '.join(sorted(linear)) or 'none'}.",
            ) from error
        return tuned

    def parameters(self, shapes: dict[str, tuple[int, int]]) -> int:
        """How many parameters are trained, given (out, in) of each linear layer but the output layer."""
        chosen = [
            shape
            for name, shape in shapes.items()
            if self.targets == "all-linear" or any(name == t or name.endswith(f".{t}") for t in self.targets)
        ]
        return sum(self.rank * (rows + columns) for rows, columns in chosen)
