"""What all adapters that PEFT makes have in common."""

from __future__ import annotations

from abc import abstractmethod
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.errors import ModelError, first_line
from tunesmith.section import AUTO, or_auto
from tunesmith.train.adapters.adapter import Adapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


# PEFT's names of what must be alike to start from an adapter, and the recipe's.
OURS = {
    "peft_type": "kind",
    "r": "rank",
    "lora_alpha": "alpha",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "num_virtual_tokens": "tokens",
}


class PeftAdapter(Adapter):
    """Small weights beside the model's own, which stay as they are; saved as PEFT saves them."""

    trains_words: ClassVar[bool] = False  # whether words that were added to the model get their embeddings trained

    resumes: ClassVar[bool] = True  # whether all that it is can be read from what it saves

    @abstractmethod
    def config(self, model: PreTrainedModel) -> PeftConfig:
        """PEFT's configuration of this adapter on a model."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        from peft import get_peft_model

        if getattr(model, "new_word_ids", None) and not self.trains_words:
            raise ModelError(
                f"adapter {self.kind} would leave them as they start, untrained",  # type: ignore[attr-defined]
                where="model.new_words",
                fix="Take train.adapter lora, tokens or full.",
            )
        try:
            config = self.config(model)
            if hasattr(model, "score"):  # PEFT then trains and saves the head too
                config.task_type = "SEQ_CLS"
            adapted = get_peft_model(model, config)
            for parameter in adapted.parameters():
                if parameter.requires_grad:  # a head comes in the base's precision
                    parameter.data = parameter.data.float()
            return adapted
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            raise ModelError(
                f"{self.kind} does not suit this model: {first_line(error)}",  # type: ignore[attr-defined]
                where="train.adapter",
                fix=f"Its linear layers are called: {_known(model)}.",
            ) from error

    def save(self, model: Any, folder: Path) -> None:
        model.save_pretrained(folder)

    def load(self, model: Any, folder: Path) -> None:
        from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

        if not self.resumes:
            super().load(model, folder)
        if not (folder / "adapter_config.json").is_file():
            raise ModelError(
                "holds no adapter, but a whole model or something else",
                where=str(folder),
                fix="Name a whole model as model.name; start_from takes adapters here.",
            )
        mine, theirs = model.peft_config["default"], PeftConfig.from_pretrained(str(folder))
        for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "num_virtual_tokens"):
            ours, found = getattr(mine, key, None), getattr(theirs, key, None)
            if ours != found:
                raise ModelError(
                    f"its {key} is {_plain(found)}, the recipe's adapter has {_plain(ours)}",
                    where=str(folder),
                    fix=f"Set train.adapter to match it ({OURS[key]}), or start from another.",
                )
        weights = load_peft_weights(str(folder), device="cpu")
        own = {name: p.shape for name, p in get_peft_model_state_dict(model).items()}
        if own != {name: p.shape for name, p in weights.items()}:
            off = sorted(
                {n for n in {*own, *weights} if n not in own or n not in weights or own[n] != weights[n].shape}
            )
            raise ModelError(
                f"{len(off)} of its weights are not those that would be trained, such as {off[0]}",
                where=str(folder),
                fix="Set train.adapter.targets as it was trained, or name the base that it was made for.",
            )
        set_peft_model_state_dict(model, weights)


class LayerAdapter(PeftAdapter):
    """An adapter beside chosen linear layers."""

    targets: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """The layers that get one: all linear ones but the output layer, or a list of names (`q_proj`) and patterns
    (`*.layers.1?.mlp.*`)."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        for target in [] if self.targets == "all-linear" else self.targets:
            if not self.reaches(model, target):
                raise ModelError(
                    f"no layer fits '{target}'",
                    where="train.adapter.targets",
                    fix=f"This model's linear layers are called: {_known(model)}.",
                )
        return super().attach(model)

    def reaches(self, model: PreTrainedModel, target: str) -> bool:
        """Whether one of `targets` names something of the model."""
        return any(_named(name, target) for name in self.layers(model))

    def layers(self, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
        """All layers that could be chosen, with their (out, in)."""
        from tunesmith.models.matrices import shapes

        return shapes(model)

    def chosen(self, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
        """The layers that `targets` names, with their (out, in)."""
        found = self.layers(model)
        if self.targets == "all-linear":
            return found
        return {name: shape for name, shape in found.items() if any(_named(name, t) for t in self.targets)}

    def modules(self, model: PreTrainedModel) -> str | list[str]:
        """`targets` as PEFT's `target_modules`."""
        if self.targets == "all-linear" or not any("*" in t or "?" in t or "[" in t for t in self.targets):
            return self.targets if isinstance(self.targets, str) else list(self.targets)
        return sorted(self.chosen(model))


class RankedAdapter(LayerAdapter):
    """An adapter whose update is a product of two matrices of a small inner size, or made of such."""

    rank: Annotated[int, *or_auto(int, ge=1)] = 16
    """The update's inner size; auto: by how many tokens there are to learn."""
    alpha: float = Field(32, gt=0)
    """The update is scaled by alpha / rank."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        if self.rank == AUTO:  # only looked at so far: any rank fits as well as the least
            return self.model_copy(update={"rank": 1}).attach(model)
        smallest = min(self.chosen(model).items(), key=lambda item: min(item[1]), default=None)
        if smallest and self.rank > min(smallest[1]):
            raise ModelError(
                f"is {self.rank}, more than layer {smallest[0]} has ({smallest[1][0]} x {smallest[1][1]})",
                where="train.adapter.rank",
                fix=f"Take at most {min(smallest[1])}, or leave that layer out of train.adapter.targets.",
            )
        return super().attach(model)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _known(model: PreTrainedModel) -> str:
    from tunesmith.models.matrices import linear_layers

    return ", ".join(sorted({name.rpartition(".")[2] for name in linear_layers(model)})) or "none"


def _named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}") or fnmatchcase(name, target)
