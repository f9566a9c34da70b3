"""LoRA and its relatives: a low-rank update beside each frozen product, through PEFT."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.train.adapters.peft_adapter import RankedAdapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

MOVES_THE_BASE = ("pissa", "pissa_niter_16", "olora")


class Lora(RankedAdapter):
    """Train B and A of W + (alpha / rank) B A, in float32, and leave W as it is (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora"] = "lora"
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the update's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Train the length of W's columns besides their direction (Liu et al. 2024, arXiv:2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora"] = "default"
    """How A and B start. pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) take them out of W; what is saved is
    still an adapter for the base as it was, of twice the rank."""
    b_rate: float = Field(1.0, gt=0)
    """B's learning rate as a multiple of A's (LoRA+, arXiv:2402.12354, advises 16)."""

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import LoraConfig

        empty = next(model.parameters()).device.type == "meta"
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.targets,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if self.init == "default" or empty else self.init,
            task_type="CAUSAL_LM",
        )

    def attach(self, model: PreTrainedModel) -> PeftModel:
        tuned = super().attach(model)
        if tuned.peft_config["default"].init_lora_weights in MOVES_THE_BASE:
            # Its weights at the start, kept to say at the end what was learnt beyond them.
            tuned.peft_config["default"].init_lora_weights = True
            with tempfile.TemporaryDirectory() as folder:
                tuned.save_pretrained(folder)
                tuned.adapter_at_start = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
        return tuned

    def save(self, model: Any, folder: Path) -> None:
        at_start = getattr(model, "adapter_at_start", None)
        if at_start is None:
            super().save(model, folder)
            return
        with tempfile.TemporaryDirectory() as start:
            for name, content in at_start.items():
                (Path(start) / name).write_bytes(content)
            model.save_pretrained(folder, path_initial_model_for_weight_conversion=start)

    def rate_of(self, name: str) -> float:
        return self.b_rate if "lora_B" in name else 1.0
