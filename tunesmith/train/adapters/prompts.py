"""Virtual tokens before every row: what they say is trained, the model itself stays as it is. Through PEFT.

They can't be merged into the model's weights: evaluation and chat load them beside it, and so does who uses the
package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from tunesmith.errors import ModelError
from tunesmith.train.adapters.peft_adapter import PeftAdapter

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


class VirtualTokens(PeftAdapter):
    """Tokens of no word before each row."""

    tokens: int = Field(16, ge=1)
    """How many."""

    def attach(self, model: PreTrainedModel) -> PeftModel:
        from tunesmith.models.virtual import install

        if hasattr(model, "score"):
            raise ModelError(
                "virtual tokens train no head, and this method's model has a new one",
                where="train.adapter",
                fix="Take another adapter, such as lora.",
            )
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context and self.tokens >= context:
            raise ModelError(
                f"is {self.tokens}, and the model reads {context} tokens at most, rows included",
                where="train.adapter.tokens",
                fix="Take fewer; 16 are usual.",
            )
        tuned = super().attach(model)
        install(tuned)
        return tuned


class Prompt(VirtualTokens):
    """Train the embeddings of virtual tokens (Lester et al. 2021, arXiv:2104.08691)."""

    kind: Literal["prompt"] = "prompt"
    text: str | None = None
    """What they say at first; words drawn from the vocabulary if not given."""

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import PromptTuningConfig

        empty = next(model.parameters()).device.type == "meta"
        return PromptTuningConfig(
            num_virtual_tokens=self.tokens,
            prompt_tuning_init="RANDOM" if empty else "TEXT" if self.text else "SAMPLE_VOCAB",
            prompt_tuning_init_text=None if empty else self.text,
            tokenizer_name_or_path=model.name_or_path if self.text and not empty else None,
            task_type="CAUSAL_LM",
        )


class PTuning(VirtualTokens):
    """Train a small network that makes the embeddings of virtual tokens (Liu et al. 2021, arXiv:2103.10385)."""

    resumes: ClassVar[bool] = False  # the network is not saved, only what it makes

    kind: Literal["p-tuning"] = "p-tuning"
    hidden: int | None = Field(None, ge=1)
    """The network's inner size; the model's own if not given."""
    network: Literal["MLP", "LSTM"] = "MLP"
    """Its kind."""

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            num_virtual_tokens=self.tokens,
            encoder_hidden_size=self.hidden or model.config.get_text_config().hidden_size,
            encoder_reparameterization_type=self.network,
            task_type="CAUSAL_LM",
        )


class Prefix(VirtualTokens):
    """Train the keys and values that virtual tokens have in each layer (Li and Liang 2021, arXiv:2101.00190)."""

    kind: Literal["prefix"] = "prefix"
    hidden: int | None = Field(None, ge=1)
    """Make them with a network of this inner size while training; trained themselves if not given."""

    def config(self, model: PreTrainedModel) -> PeftConfig:
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            num_virtual_tokens=self.tokens,
            prefix_projection=self.hidden is not None,
            encoder_hidden_size=self.hidden,
            task_type="CAUSAL_LM",
        )
