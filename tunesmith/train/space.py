"""The recipe's `tune`: what a search may change, and how long it may look."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.section import Section


class Range(Section):
    """Numbers from `low` to `high`."""

    low: float
    """The least."""
    high: float
    """The most."""
    log: bool | None = None
    """Drawn evenly in the logarithm; where high is ten times low or more, if not given."""
    whole: bool = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"a range goes up, and above 0 where it is logarithmic; not from {self.low} to {self.high}"
            )
        return self

    @property
    def logarithmic(self) -> bool:
        return self.low > 0 and self.high >= 10 * self.low if self.log is None else self.log


class TuneSection(Section):
    """A search for better settings: `tunesmith tune`."""

    space: dict[str, Range | list[Any]] = Field(default_factory=dict)
    """Recipe keys and what they may be: a list of values, `{low: 1.0e-4, high: 1.0e-2}`, or `1.0e-4..1.0e-2`."""
    trials: int = Field(20, ge=1)
    """Trainings, pruned ones included."""
    workers: int = Field(1, ge=1)
    """Processes that train side by side and share the cores."""
    pruning: bool = True
    """Stop a training whose validation is worse than the median of the others' at that step."""
    try_first: int = Field(4, ge=0)
    """Trials that are never pruned, to have a median."""
    engine: Literal["optuna", "ray"] = "optuna"
    """What searches: Optuna on this machine, or Ray Tune on a cluster."""

    @field_validator("space", mode="before")
    @classmethod
    def _space(cls, given: Any) -> Any:
        return {key: as_range(value) for key, value in given.items()} if isinstance(given, dict) else given

    @field_validator("space")
    @classmethod
    def _known(cls, space: dict[str, Any]) -> dict[str, Any]:
        wrong = [key for key, values in space.items() if key == "name" or key.startswith("tune") or values == []]
        if wrong:
            raise ValueError(f"'{wrong[0]}' can't be searched over")
        return space


def as_range(value: Any) -> Any:
    """`1e-4..1e-2` and `8..64` as the ranges that they mean."""
    if not isinstance(value, str) or ".." not in value:
        return value
    low, _, high = value.partition("..")
    return {"low": low.strip(), "high": high.strip(), "whole": all(n.strip().isdigit() for n in (low, high))}
