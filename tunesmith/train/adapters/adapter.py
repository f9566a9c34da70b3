"""What the loop asks of an adapter. Most need no more than `attach` and `save`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.errors import ModelError
from tunesmith.section import Section

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tunesmith.conversation.render import Rendered


class Adapter(Section):
    """What is trained of a model.

    Attributes:
        whole_model: what is saved is a model of its own, not weights for a base.
        lost_rank: of what quantising takes from each weight, the rank that `attach` wants kept (0: nothing).
    """

    whole_model: ClassVar[bool] = False

    @property
    def lost_rank(self) -> int:
        return 0

    def refuses(self, quantise: str | None) -> str | None:
        """Why it can't be trained on a base in this format (None: as it is), if it can't."""
        return None

    @abstractmethod
    def attach(self, model: PreTrainedModel) -> Any:
        """The model with what is trained in it (in place), everything else frozen.

        Raises:
            ModelError: the adapter does not suit the model.
        """

    @abstractmethod
    def save(self, model: Any, folder: Path) -> None:
        """Write what was trained as its library loads it."""

    def load(self, model: Any, folder: Path) -> None:
        """Take up what `save` wrote, so that training starts there.

        Raises:
            ModelError: it is of another kind, shape or model.
        """
        raise ModelError(
            f"{self.kind} can't start from what was trained before",  # type: ignore[attr-defined]
            where="train.start_from",
            fix="Leave it out, or take an adapter that can, such as lora.",
        )

    def begin(self, model: Any, rows: Sequence[Rendered], steps: int) -> None:
        """Before the first step of a run, and again before it goes on: what depends on rows or their number."""

    def regularise(self, model: Any) -> None:
        """Add the gradient of what the method adds to the loss, once a step."""

    def after_step(self, model: Any, step: int) -> None:
        """After the weights of step `step` (from 1) moved, while their gradients are there."""

    def state(self, model: Any) -> dict[str, Tensor]:
        """What a checkpoint must hold besides the weights."""
        return {}

    def restore(self, model: Any, state: dict[str, Tensor]) -> None:
        """Take `state` up again."""

    def rate_of(self, name: str) -> float:
        """A weight's learning rate, as a multiple of `train.learning_rate`."""
        return 1.0
