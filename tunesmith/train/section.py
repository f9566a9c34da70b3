"""The recipe's `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from tunesmith import plugins
from tunesmith.errors import nearest
from tunesmith.models.ways import Ways
from tunesmith.section import AUTO, Section, or_auto

__all__ = ["AUTO", "TAGGED", "TrainSection"]

TAGGED = "loss_"  # what the validation loss of a tag's rows is called, before the tag


def _ways(value: Any) -> Any:
    return {} if value == "auto" else value


class TrainSection(Section):
    """How the model is trained."""

    method: plugins.field("objective") = "sft"  # type: ignore[valid-type]
    """The training method: sft, text, dpo, kto, orpo, simpo, cpo, reward, classify or distill. docs/methods.md."""
    adapter: plugins.field("adapter") = "lora"  # type: ignore[valid-type]
    """What is trained: small weights on top of the frozen base (lora, loha, lokr, vera, oft, ia3), or the base's own
    (full, partial)."""
    start_from: str | None = None
    """A run, or a folder, whose adapter (or, for adapter full and partial, whole model) is where training starts."""
    quantise: Literal["nf4", "int8", "int4-torchao", "int8-torchao"] | None = None
    """Keep the frozen base's linear layers in 4 or 8 bits while training (QLoRA): nf4 and int8 by bitsandbytes,
    int4-torchao and int8-torchao by torchao. Evaluation and the package use the base as it is."""
    epochs: Annotated[float, *or_auto(float, gt=0)] = 3
    """Passes over the training rows; may be a fraction. auto: three, fewer or more by how many rows there are."""
    max_steps: int | None = Field(None, ge=0)
    """Stop after this many optimizer steps, whatever `epochs` says; 0 takes `start_from` as it is."""
    batch_size: Annotated[int, *or_auto(int, ge=1)] = 16
    """Rows in an optimizer step; auto: by how many rows there are. How they are packed for the machine does not change
    the result."""
    pack_tokens: Annotated[int, *or_auto(int, ge=1)] = AUTO  # type: ignore[assignment]
    """Tokens in one forward pass; rows of a step are packed up to it, and gradients are added up. auto: 512 in float32
    on a processor, 1,024 elsewhere."""
    max_length: Annotated[int, *or_auto(int, ge=8)] = 1024
    """Longest row in tokens; auto: the model's context, up to 4,096. `data.over_length` says what becomes of longer
    ones."""
    learning_rate: Annotated[float, *or_auto(float, ge=0)] = 2e-4
    """The peak rate; auto: by the model's size, the method, the adapter and the optimizer."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """How the rate falls after the warm-up, towards zero after the last step. wsd stays until `decay` is left."""
    decay: float = Field(0.2, gt=0, le=1)
    """Share of the steps in which schedule wsd falls, in a straight line."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero."""
    optimizer: plugins.field("optimizer") = "adamw"  # type: ignore[valid-type]
    """What turns gradients into steps: adamw, adafactor, sgd, lion, muon, schedule_free, adamw_8bit, paged_adamw or
    galore; a mapping with `kind` sets its own keys."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (sgd: added to the gradient); never on vectors (norms, biases, scales)."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each decoder layer's learning rate as a multiple of the one's above it; embeddings come below the first layer
    (Howard and Ruder 2018, arXiv:1801.06146)."""
    neftune: float | None = Field(None, gt=0)
    """Uniform noise on the embeddings in training, of this size / sqrt(row's tokens * width); 5 is usual (Jain et al.
    2023, arXiv:2310.05914)."""
    speed: Annotated[Ways, BeforeValidator(_ways, json_schema_input_type=Literal["auto"] | Ways)] = Ways()
    """`auto`, or what to turn off or on."""
    keep: list[plugins.field("keep")] = Field(default_factory=list)  # type: ignore[valid-type]
    """Against forgetting, terms beside the loss: l2 (distance from the start), ewc (the same, weighted by some general
    rows), kl (what the model says on replay rows)."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of a step's gradient; a longer one is scaled down."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the weights as they compute. What is trained is always float32: adapters, and the masters of trained weights
    that compute in bfloat16. `auto`: what this machine is faster at."""
    parallel: plugins.field("parallel") = "ddp"  # type: ignore[valid-type]
    """How several ranks (`--nproc`, torchrun) share the work: ddp, fsdp or zero. One process takes no notice."""
    validate_every: int | None = Field(None, ge=1)
    """Steps between validations; once an epoch if not given. The last step always validates."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay on disk, besides the best weights."""
    snapshots: int = Field(0, ge=0)
    """How many epochs' weights stay on disk as they were at their end, each as a model of its own
    (train/snapshots/step-N); a run that is stopped leaves one too."""
    keep_best: bool = True
    """End with the best weights (see `best_by`) instead of the last ones."""
    best_by: str = "loss"
    """What the best weights are best by, and what early stopping waits for: the validation loss, another figure of the
    validation (loss_TAG, or what the method tells, such as rewards_accuracy), or a metric of answers to validation
    rows, such as exact_match."""
    scored_rows: int = Field(64, ge=1)
    """Validation rows that are answered for `best_by`, drawn by seed."""
    samples: int = Field(3, ge=0)
    """Validation rows that are answered at each validation, to be read in the report."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after this many validations that are not better."""
    trackers: list[plugins.field("tracker")] = Field(default_factory=list)  # type: ignore[valid-type]
    """Where figures go besides metrics.jsonl: tensorboard, wandb, mlflow, clearml, dvclive. None if not given."""

    @field_validator("best_by")
    @classmethod
    def _best_by(cls, value: str, info: ValidationInfo) -> str:
        method = info.data.get("method")
        known = [*getattr(method, "figures", {}), *plugins.known("metric")]
        if value not in known and not value.startswith(TAGGED):
            raise ValueError(
                f"no metric and no figure of this method is called '{value}'{nearest(value, known)} "
                f"(known: {', '.join(dict.fromkeys(known))}; and {TAGGED}TAG)"
            )
        return value

    @property
    def figure(self) -> bool | None:
        """Where `best_by` is a figure that validation tells, whether a higher one is better; None where it is a score
        of answers."""
        if self.best_by == "loss" or self.best_by.startswith(TAGGED):
            return False
        found: bool | None = self.method.figures.get(self.best_by)
        return found

    @model_validator(mode="before")
    @classmethod
    def _some_optimizers_have_no_schedule(cls, keys: Any) -> Any:
        chosen = keys.get("optimizer") if isinstance(keys, dict) else None
        kind = chosen.get("kind") if isinstance(chosen, dict) else getattr(chosen, "kind", chosen)
        return {"schedule": "constant"} | keys if kind == "schedule_free" else keys

    @model_validator(mode="after")
    def _the_rate_stays(self) -> TrainSection:
        if self.optimizer.constant_rate and self.schedule != "constant":
            raise ValueError(f"optimizer {self.optimizer.kind} wants schedule constant, not {self.schedule}")
        return self

    @model_validator(mode="after")
    def _auto_has_a_rule(self) -> TrainSection:
        if self.learning_rate == AUTO and self.optimizer.rate_beside_adamw is None:
            raise ValueError(
                f"learning_rate auto has no rule for optimizer {self.optimizer.kind} as it is set: give a number"
            )
        return self

    @model_validator(mode="after")
    def _adapter_suits_the_format(self) -> TrainSection:
        if self.max_steps == 0 and not self.start_from:
            raise ValueError("max_steps 0 trains nothing; it goes with start_from only")
        why = self.adapter.refuses(self.quantise)
        if why:
            raise ValueError(f"adapter {self.adapter.kind} with quantise {self.quantise}: {why}")
        return self
