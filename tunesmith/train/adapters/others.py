"""Adapters that are not LoRA, through PEFT: other factorisations, rotations and scalings of the frozen weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from tunesmith.errors import ModelError
from tunesmith.train.adapters.peft_adapter import LayerAdapter, PeftAdapter, RankedAdapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


class _ShapedByTheWeight(RankedAdapter):
    def refuses(self, quantise: str | None) -> str | None:
        if quantise not in ("nf4", "int4-torchao"):
            return None
        return "PEFT reads its shape off the weight, and one in 4 bits has another; take 8 bits, or lora"


class LoHa(_ShapedByTheWeight):
    """The element-wise product of two low-rank updates (Hyeon-Woo et al. 2021, arXiv:2108.06098)."""

    kind: Literal["loha"] = "loha"

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import LoHaConfig

        return LoHaConfig(r=self.rank, alpha=self.alpha, target_modules=self.modules(model), task_type="CAUSAL_LM")


class LoKr(_ShapedByTheWeight):
    """The Kronecker product of a small matrix and a low-rank one (Yeh et al. 2023, arXiv:2309.14859)."""

    kind: Literal["lokr"] = "lokr"

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import LoKrConfig

        return LoKrConfig(r=self.rank, alpha=self.alpha, target_modules=self.modules(model), task_type="CAUSAL_LM")


class Vera(LayerAdapter):
    """Scales of two random matrices that all layers share (Kopiczko et al. 2023, arXiv:2310.11454)."""

    kind: Literal["vera"] = "vera"
    rank: int = Field(256, ge=1)
    """The shared matrices' inner size."""

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import VeraConfig

        return VeraConfig(r=self.rank, target_modules=self.modules(model), task_type="CAUSAL_LM")


class Oft(LayerAdapter):
    """Rotations of the weights' input, block by block (Qiu et al. 2023, arXiv:2306.07280)."""

    kind: Literal["oft"] = "oft"
    block_size: int = Field(32, ge=2)
    """Inputs that are turned together; must divide each layer's."""

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import OFTConfig

        _divides(self.block_size, self.chosen(model))
        return OFTConfig(r=0, oft_block_size=self.block_size, target_modules=self.modules(model), task_type="CAUSAL_LM")


class Boft(LayerAdapter):
    """Rotations of the weights made of few small ones, as butterflies (Liu et al. 2023, arXiv:2311.06243)."""

    kind: Literal["boft"] = "boft"
    block_size: int = Field(4, ge=2)
    """Inputs that are turned together; must divide each layer's."""
    butterflies: int = Field(1, ge=1)
    """Rounds of turning; with n of them a layer's inputs must be a multiple of 2^(n - 1) blocks. More than one needs
    CUDA."""

    def refuses(self, quantise: str | None) -> str | None:
        return quantise and "boft turns the base's weights themselves, and quantised ones can't be turned; take oft"

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import BOFTConfig
        from peft.tuners.boft.layer import get_fbd_cuda

        if self.butterflies > 1 and get_fbd_cuda() is None:  # PEFT would take one round, and save that it took more
            raise ModelError(
                f"is {self.butterflies}, and without CUDA (and a compiler for PEFT's kernel) there is one round only",
                where="train.adapter.butterflies",
                fix="Leave it out, or train on a CUDA device.",
            )
        _divides(self.block_size, self.chosen(model))
        return BOFTConfig(
            boft_block_size=self.block_size,
            boft_n_butterfly_factor=self.butterflies,
            target_modules=self.modules(model),
            task_type="CAUSAL_LM",
        )


class Ia3(LayerAdapter):
    """Learnt scales of keys, values and the feed-forward's inner activations (Liu et al. 2022, arXiv:2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    targets: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = "auto"  # type: ignore[assignment]
    """Names of the layers that are scaled; PEFT's choice for the model's family if `auto`."""
    feedforward: list[str] = Field(default_factory=list)
    """Those of them whose input is scaled rather than their output; given only beside `targets`."""

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import IA3Config

        if self.targets == "auto":
            return IA3Config(task_type="CAUSAL_LM")
        return IA3Config(target_modules=self.targets, feedforward_modules=self.feedforward, task_type="CAUSAL_LM")

    def reaches(self, model: PreTrainedModel, target: str) -> bool:
        return self.targets == "auto" or super().reaches(model, target)


class Tokens(PeftAdapter):
    """Only the embeddings of the words that `model.new_words` adds."""

    trains_words: ClassVar[bool] = True

    kind: Literal["tokens"] = "tokens"

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import TrainableTokensConfig

        words = getattr(model, "new_word_ids", None)
        if not words:
            raise ModelError(
                "tokens trains the words that are added, and none are",
                where="train.adapter",
                fix="Name them in model.new_words.",
            )
        return TrainableTokensConfig(token_indices=words, task_type="CAUSAL_LM")


def _divides(size: int, layers: dict[str, tuple[int, int]]) -> None:
    for name, (_, width) in layers.items():
        if width % size:
            raise ModelError(
                f"is {size}, which does not divide the {width} inputs of layer {name}",
                where="train.adapter.block_size",
                fix=f"Take one that does, such as {_divisor(width, size)}.",
            )


def _divisor(width: int, near: int) -> int:
    """The largest size up to `near` that divides, or else the smallest there is."""
    smaller = [n for n in range(2, near) if width % n == 0]
    return max(smaller) if smaller else next(n for n in range(2, width + 1) if width % n == 0)
