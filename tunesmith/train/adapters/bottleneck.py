"""Small networks between a decoder layer's parts (models/bottleneck.py)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.errors import ModelError
from tunesmith.train.adapters.adapter import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BottleneckAdapter(Adapter):
    """A small network after attention and MLP (houlsby), after the MLP (pfeiffer) or beside it (parallel)."""

    kind: Literal["bottleneck"] = "bottleneck"
    style: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer"
    """Where it lies."""
    size: int = Field(64, ge=1)
    """Its inner size."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """What bends between its two matrices."""
    scale: float = Field(1.0, gt=0)
    """What its output is multiplied by; for parallel, 4 is advised."""

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        from tunesmith.models import bottleneck

        width = model.config.get_text_config().hidden_size
        if self.size > width:
            raise ModelError(
                f"is {self.size}, more than the model's hidden size, {width}",
                where="train.adapter.size",
                fix=f"Take at most {width}; a sixteenth of it is usual.",
            )
        attached: PreTrainedModel = bottleneck.attach(model, self.style, self.size, self.activation, self.scale)
        return attached

    def save(self, model: Any, folder: Path) -> None:
        from tunesmith.models import bottleneck

        bottleneck.save(model, folder)

    def load(self, model: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        from tunesmith.models import bottleneck

        if not (folder / bottleneck.CONFIG).is_file():
            raise ModelError("holds no bottleneck adapter", where=str(folder), fix="Name a run that trained one.")
        bottleneck.fill(model, load_file(folder / bottleneck.WEIGHTS), folder)
