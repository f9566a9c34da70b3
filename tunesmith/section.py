"""The base of every part of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, numbers are finite, and a field's docstring is its help text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


AUTO = "auto"


def _number_or_auto(value: Any, number: ValidatorFunctionWrapHandler) -> Any:
    return value if value == AUTO else number(value)


def or_auto(kind: type, **limits: Any) -> tuple[Any, ...]:
    """What lets a number's field be "auto" too, for a rule to choose: Annotated[float, *or_auto(float, gt=0)]."""
    schema = Annotated[kind, Field(**limits)] | Literal["auto"]  # type: ignore[valid-type]
    keep = PlainSerializer(lambda value: value, return_type=Any)
    return Field(**limits), WrapValidator(_number_or_auto, json_schema_input_type=schema), keep
