"""What creates a job: OpenAI's fields, and ours."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from tunesmith.section import AUTO, Section, or_auto


class Hyperparameters(Section):
    """Numbers, or "auto" for a rule to choose (docs/control.md)."""

    n_epochs: Annotated[int, *or_auto(int, ge=1, le=50)] = AUTO  # type: ignore[assignment]
    """Passes over the training file."""
    batch_size: Annotated[int, *or_auto(int, ge=1, le=256)] = AUTO  # type: ignore[assignment]
    """Rows in a step."""
    learning_rate_multiplier: Annotated[float, *or_auto(float, gt=0)] = AUTO  # type: ignore[assignment]
    """Of the rate that the rule chooses; auto is 1."""


class DpoHyperparameters(Hyperparameters):
    """Those of pairs."""

    beta: Annotated[float, *or_auto(float, gt=0, le=2)] = AUTO  # type: ignore[assignment]
    """How strongly the model is held near where it began; auto is 0.1."""


class Supervised(Section):
    hyperparameters: Hyperparameters = Hyperparameters()


class Dpo(Section):
    hyperparameters: DpoHyperparameters = DpoHyperparameters()


class Method(Section):
    """How to train. `train.method` has the others of Tunesmith's."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = None

    @property
    def hyperparameters(self) -> Hyperparameters:
        return (
            (self.dpo or Dpo()).hyperparameters
            if self.type == "dpo"
            else (self.supervised or Supervised()).hyperparameters
        )


class WandbIntegration(Section):
    project: str = Field(min_length=1, max_length=128)
    name: str | None = None
    entity: str | None = None
    tags: list[str] = Field(default_factory=list, max_length=64)


class Integration(Section):
    type: Literal["wandb"]
    wandb: WandbIntegration


class Resources(Section):
    """What the job may take at most; its plan is held against it before it starts."""

    cores: int | None = Field(None, ge=1)
    memory_gib: float | None = Field(None, gt=0)
    gpus: int | None = Field(None, ge=0)


def _pairs(value: dict[str, str] | None) -> dict[str, str] | None:
    if value and any(not key or len(key) > 64 or len(text) > 512 for key, text in value.items()):
        raise ValueError("a key has at most 64 characters, a value at most 512")
    return value


class JobRequest(Section):
    """A fine-tuning job. Everything below `hyperparameters` is Tunesmith's own: clients give it as `extra_body`."""

    model: str = Field(min_length=1, max_length=512)
    """A base model's name, or an earlier `ft:` model, from which training goes on."""
    training_file: str = Field(max_length=255)
    validation_file: str | None = Field(None, max_length=255)
    suffix: str | None = Field(None, min_length=1, max_length=64)
    """Stands in the model's name."""
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    metadata: Annotated[dict[str, str] | None, AfterValidator(_pairs)] = Field(None, max_length=16)
    integrations: list[Integration] | None = Field(None, max_length=5)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    """The older place of those of a supervised job."""
    train: dict[str, Any] | None = None
    """Keys of a recipe's `train`: `{"adapter": {"kind": "lora", "rank": 32}}`; they win over hyperparameters."""
    data: dict[str, Any] | None = None
    """Of a recipe's `data`: system, over_length, max_rejected, split, balance, clean."""
    evaluate: dict[str, Any] | None = None
    """Of a recipe's `evaluate`; then the model is compared with its base on held-out rows: metrics, rows,
    max_new_tokens."""
    goal: dict[str, Any] | None = None
    """A recipe's `goal`."""
    gate: dict[str, Any] | list[str] | bool | None = None
    """A recipe's `gate`: a model that it holds is not served."""
    priority: int = Field(0, ge=-100, le=100)
    """Jobs with a higher one start first; above 0 takes an admin's key."""
    resources: Resources = Resources()

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_auto(cls, keys: Any) -> Any:
        if isinstance(keys, dict):
            return {key: value for key, value in keys.items() if value is not None}
        return keys

    @property
    def asked(self) -> Method:
        """The method, with the hyperparameters of the older place if the new one has none."""
        if self.method is None:
            return Method(
                type="supervised", supervised=Supervised(hyperparameters=self.hyperparameters or Hyperparameters())
            )
        if self.method.type == "supervised" and self.method.supervised is None and self.hyperparameters:
            return self.method.model_copy(update={"supervised": Supervised(hyperparameters=self.hyperparameters)})
        return self.method

    @property
    def settings(self) -> dict[str, Any]:
        """What is Tunesmith's own, as it was given."""
        given = {
            "train": self.train,
            "data": self.data,
            "evaluate": self.evaluate,
            "goal": self.goal,
            "gate": self.gate,
        }
        return {key: value for key, value in given.items() if value is not None}
