"""What all adapters that PEFT makes have in common."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from tunesmith.errors import ModelError
from tunesmith.section import AUTO, Section, or_auto

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


class PeftAdapter(Section):
    """Small weights beside the model's linear layers, which stay as they are; saved as PEFT saves them."""

    whole_model: ClassVar[bool] = False

    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get one, or all linear ones but the output layer."""

    @abstractmethod
    def config(self, model: PreTrainedModel) -> PeftConfig:
        """PEFT's configuration of this adapter on a model."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """Put the adapter's layers into the model (in place) and freeze everything else.

        Raises:
            ModelError: no layer has one of the names in `targets` (lists those there are), or PEFT finds that
                the adapter does not suit the model.
        """
        from peft import get_peft_model

        from tunesmith.models.plan import linear_layers

        try:
            config = self.config(model)
            if hasattr(model, "score"):  # PEFT then trains and saves the head too
                config.task_type = "SEQ_CLS"
            adapted = get_peft_model(model, config)
            for parameter in adapted.parameters():
                if parameter.requires_grad:  # a head comes in the base's precision
                    parameter.data = parameter.data.float()
            return adapted
        except (ValueError, TypeError, RuntimeError) as error:
            linear = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
            absent = isinstance(self.targets, list) and not any(_named(n, self.targets) for n in linear_layers(model))
            told = f"no layer fits {self.targets}" if absent or not linear else f"does not suit this model: {error}"
            raise ModelError(
                told.splitlines()[0][:300],
                where="train.adapter.targets",
                fix=f"This model's linear layers are called: {', '.join(linear) or 'none'}.",
            ) from error

    def save(self, model: Any, folder: Path) -> None:
        """Write the adapter as PEFT loads it on the base."""
        model.save_pretrained(folder)

    def rate_of(self, name: str) -> float:
        """A weight's learning rate, as a multiple of `train.learning_rate`."""
        return 1.0

    def chosen(self, model: PreTrainedModel) -> dict[str, tuple[int, int]]:
        """The layers that `targets` names, with their (out, in)."""
        from tunesmith.models.plan import linear_layers

        found = linear_layers(model)
        if isinstance(self.targets, list):
            return {name: shape for name, shape in found.items() if _named(name, self.targets)}
        return found


class RankedAdapter(PeftAdapter):
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


def _named(name: str, targets: list[str]) -> bool:
    return any(name == t or name.endswith(f".{t}") for t in targets)
