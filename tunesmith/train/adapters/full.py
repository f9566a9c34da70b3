"""Training the model's own weights: all of them, or some."""

from __future__ import annotations

import random
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunesmith.errors import ModelError
from tunesmith.section import Section
from tunesmith.train.adapters.adapter import Adapter
from tunesmith.train.layers import depths, layer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Lisa(Section):
    """Layer-wise importance sampling (Pan et al. 2024, arXiv:2403.17919): only some decoder layers are trained at a
    time, drawn anew now and then, with what lies outside the layers. An optimizer keeps no state of the others."""

    layers: int = Field(2, ge=1)
    """How many layers at a time."""
    every: int = Field(20, ge=1)
    """Steps between draws."""


class Full(Adapter):
    """Train every weight. What is saved is a whole model."""

    whole_model: ClassVar[bool] = True

    kind: Literal["full"] = "full"
    unfreeze_every: int | None = Field(None, ge=1)
    """Begin with the last layer and what follows it, and open one more layer every so many steps (gradual unfreezing,
    Howard and Ruder 2018, arXiv:1801.06146); embeddings come last."""
    lisa: Lisa | None = None
    """Train a few layers at a time, drawn at random."""

    @model_validator(mode="after")
    def _one_order(self) -> Full:
        if self.lisa and self.unfreeze_every:
            raise ValueError("lisa and unfreeze_every exclude each other; leave one out")
        return self

    def refuses(self, quantise: str | None) -> str | None:
        return quantise and "weights in so few bits take no gradient; take an adapter beside them, such as lora"

    def attach(self, model: PreTrainedModel) -> PreTrainedModel:
        if not all(p.is_floating_point() for p in model.parameters()):
            raise ModelError(
                "its weights are quantised, and such weights take no gradient",
                where="train.adapter",
                fix="Take an adapter that lies beside them, such as lora, or a base in bfloat16 or float32.",
            )
        layers = model.config.get_text_config().num_hidden_layers
        if self.lisa and self.lisa.layers > layers:
            raise _too_many("lisa.layers", self.lisa.layers, layers)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trains(model, name))
        return model

    def trains(self, model: PreTrainedModel, name: str) -> bool:
        """Whether the weight of this name is trained."""
        return True

    def trained_at(self, step: int, names: Sequence[str], seed: int) -> set[str]:
        """Which of the weights that this adapter trains are trained at a step (counted from 0).

        Follows from the step and the seed alone, so that a run can go on from any step.
        """
        heights = depths(names)
        layers = sorted({height for name, height in heights.items() if layer_of(name) is not None})
        if not layers:
            return set(names)
        if self.unfreeze_every:
            open_layers = 1 + step // self.unfreeze_every
            lowest = layers[-open_layers] if open_layers <= len(layers) else 0
            return {name for name, height in heights.items() if height >= lowest}
        if self.lisa:
            draw = random.Random(f"{seed} {step // self.lisa.every}")
            drawn = set(draw.sample(layers, min(self.lisa.layers, len(layers))))
            return {name for name, height in heights.items() if layer_of(name) is None or height in drawn}
        return set(names)

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)


class Partial(Full):
    """Train some of the weights and leave the others as they are. What is saved is a whole model."""

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
            raise _too_many("last_layers", self.last_layers, layers)
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
        number = layer_of(name)
        if self.last_layers and number is not None and number >= layers - self.last_layers:
            return True
        module, _, _ = name.rpartition(".")
        if self.only == "embeddings" and model.get_submodule(module) is model.get_input_embeddings():
            return True
        if self.only == "norms" and "norm" in type(model.get_submodule(module)).__name__.lower():
            return True
        return any(fnmatch(name, pattern) for pattern in self.names)


def _too_many(key: str, asked: int, layers: int) -> ModelError:
    return ModelError(
        f"is {asked}, the model has {layers} layers", where=f"train.adapter.{key}", fix=f"Take at most {layers}."
    )
