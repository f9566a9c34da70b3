"""Training the model's own weights: all of them, or some."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunesmith.errors import ModelError
from tunesmith.section import Section

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(Section):
    """Train every weight, in float32. What is saved is a whole model."""

    whole_model: ClassVar[bool] = True

    kind: Literal["full"] = "full"

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        """Mark what is trained (in place)."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(model, name))
        return model

    def trains(self, model: PreTrainedModel, name: str) -> bool:
        """Whether the weight of this name is trained."""
        return True

    def save(self, model: Any, folder: Path) -> None:
        """Write the model as transformers loads it."""
        model.save_pretrained(folder)

    def rate_of(self, name: str) -> float:
        """A weight's learning rate, as a multiple of `train.learning_rate`."""
        return 1.0


class Partial(Full):
    """Train some of the weights, in float32, and leave the others as they are. What is saved is a whole model."""

    kind: Literal["partial"] = "partial"  # type: ignore[assignment]
    last_layers: int | None = Field(None, ge=1)
    """Train so many of the last decoder layers."""
    only: Literal["embeddings", "norms"] | None = None
    """Train the token embeddings, or the norms."""
    names: list[str] = Field(default_factory=list)
    """Train the weights whose names fit one of these patterns, such as `*.mlp.*`."""

    @model_validator(mode="after")
    def _something(self) -> Partial:
        if not self.last_layers and not self.only and not self.names:
            raise ValueError("adapter partial needs last_layers, only or names")
        return self

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        layers = model.config.get_text_config().num_hidden_layers
        if self.last_layers and self.last_layers > layers:
            raise ModelError(
                f"is {self.last_layers}, the model has {layers} layers",
                where="train.adapter.last_layers",
                fix=f"Take at most {layers}.",
            )
        super().attach(model)
        if not any(p.requires_grad for p in model.parameters()):
            shown = ", ".join(name for name, _ in list(model.named_parameters())[:12])
            raise ModelError(
                f"no weight fits {self.names or self.only or self.last_layers}",
                where="train.adapter",
                fix=f"This model's weights are called: {shown}, ...",
            )
        return model

    def trains(self, model: PreTrainedModel, name: str) -> bool:
        layers = model.config.get_text_config().num_hidden_layers
        number = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if self.last_layers and number is not None and number >= layers - self.last_layers:
            return True
        module, _, _ = name.rpartition(".")
        if self.only == "embeddings" and model.get_submodule(module) is model.get_input_embeddings():
            return True
        if self.only == "norms" and "norm" in type(model.get_submodule(module)).__name__.lower():
            return True
        return any(fnmatch(name, pattern) for pattern in self.names)
