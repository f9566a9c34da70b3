"""LoRA and its relatives: a low-rank update beside each frozen product, through PEFT."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.train.adapters.peft_adapter import RankedAdapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from tunesmith.conversation.render import Rendered

OUT_OF_THE_BASE = ("pissa", "pissa_niter_16", "olora")
EXPERTS = "experts"
EVA_ROWS, EVA_BATCH = 64, 4


class Lora(RankedAdapter):
    """Train B and A of W + (alpha / rank) B A, in float32, and leave W as it is (Hu et al. 2021, arXiv:2106.09685).

    In a mixture of experts, `experts` in `targets` stands for every expert's matrices: each gets its own B and A.
    """

    trains_words: ClassVar[bool] = True

    kind: Literal["lora"] = "lora"
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the update's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    dora: bool = False
    """Train the length of W's columns besides their direction (Liu et al. 2024, arXiv:2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "loftq", "eva"] = "default"
    """How A and B start. pissa (arXiv:2404.02948) and olora (arXiv:2406.01775) take them out of W, loftq
    (arXiv:2310.08659) out of what `train.quantise` lost of W; what is saved is still an adapter for the base as it was,
    of twice the rank. eva (arXiv:2410.07170) takes A out of what training rows send into the layer."""
    eva_spread: float = Field(1.0, ge=1)
    """With init eva: a layer may get up to this many times `rank`, taken from layers that need less."""
    b_rate: float = Field(1.0, gt=0)
    """B's learning rate as a multiple of A's (LoRA+, arXiv:2402.12354, advises 16)."""

    @property
    def lost_rank(self) -> int:
        return self.rank if self.init == "loftq" else 0

    def refuses(self, quantise: str | None) -> str | None:
        if quantise and self.init in OUT_OF_THE_BASE:
            return f"init {self.init} changes the base's weights, and quantised ones can't be changed; take init loftq"
        if self.init == "loftq" and not quantise:
            return "init loftq starts from what quantising lost, and nothing is quantised; set quantise, such as nf4"
        return None

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import EvaConfig, LoraConfig

        empty = next(model.parameters()).device.type == "meta"
        init = "default" if empty and self.init != "eva" else self.init
        words = getattr(model, "new_word_ids", None)
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.modules(model),
            target_parameters=expert_names(model) if EXPERTS in self.targets else None,
            trainable_token_indices={_embeddings(model): words} if words else None,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if init in ("default", "loftq") else init,
            eva_config=EvaConfig(rho=self.eva_spread) if init == "eva" else None,
            task_type="CAUSAL_LM",
        )

    def attach(self, model: PreTrainedModel) -> PeftModel:
        empty = next(model.parameters()).device.type == "meta"
        tuned = super().attach(model)
        if self.init == "loftq" and not empty:
            _start_from_what_was_lost(tuned)
        if self.init in (*OUT_OF_THE_BASE, "loftq") and not empty:
            # Its weights at the start, kept to say at the end what was learnt beyond them.
            tuned.peft_config["default"].init_lora_weights = True
            with tempfile.TemporaryDirectory() as folder:
                tuned.save_pretrained(folder)
                tuned.adapter_at_start = {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}
        return tuned

    def modules(self, model: PreTrainedModel) -> str | list[str]:
        given = super().modules(model)
        return given if isinstance(given, str) else [name for name in given if name != EXPERTS]

    def reaches(self, model: PreTrainedModel, target: str) -> bool:
        return bool(expert_names(model)) if target == EXPERTS else super().reaches(model, target)

    def begin(self, model: PeftModel, rows: Sequence[Rendered], steps: int) -> None:
        if self.init == "eva":
            from peft import initialize_lora_eva_weights

            batches = [_padded(rows[i : i + EVA_BATCH]) for i in range(0, min(len(rows), EVA_ROWS), EVA_BATCH)]
            initialize_lora_eva_weights(model, batches, forward_fn=_read, show_progress_bar=False)

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


def expert_names(model: PreTrainedModel) -> list[str]:
    """The names under which a mixture's layers hold their experts' matrices, such as `mlp.experts.down_proj`."""
    from tunesmith.models.matrices import experts

    return sorted({".".join(name.split(".")[-3:]) for name in experts(model)})


def _embeddings(model: PreTrainedModel) -> str:
    wanted = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is wanted).rpartition(".")[2]


def _start_from_what_was_lost(tuned: PeftModel) -> None:
    """Set B A to the best low-rank picture of W minus its quantised self, which each layer kept when it was read."""
    import torch

    with torch.no_grad():
        for module in tuned.modules():
            lost = getattr(getattr(module, "base_layer", None), "lost", None)
            if lost is not None:
                up, down = lost
                module.lora_B["default"].weight.copy_(up / module.scaling["default"])
                module.lora_A["default"].weight.copy_(down)
                module.base_layer.lost = None


def _read(model: Any, batch: dict[str, Any]) -> Any:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def _padded(rows: Sequence[Rendered]) -> dict[str, Any]:
    """Rows as PEFT's batches, padded at the right; tokens without loss are labelled -100."""
    import torch

    width = max(map(len, rows))
    ids = [r.ids + [0] * (width - len(r)) for r in rows]
    seen = [[1] * len(r) + [0] * (width - len(r)) for r in rows]
    labels = [
        [i if w else -100 for i, w in zip(r.ids, r.weights, strict=True)] + [-100] * (width - len(r)) for r in rows
    ]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(seen), "labels": torch.tensor(labels)}
