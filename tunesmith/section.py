"""The base of every part of a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, and a field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True)


AUTO = "auto"


def _or_auto(value: Any, number: ValidatorFunctionWrapHandler) -> Any:
    return value if value == AUTO else number(value)


_AS_IT_IS = PlainSerializer(lambda value: value, return_type=Any)
# A number, or "auto" where a rule is to choose it. Write limits inside: Annotated[float, Field(gt=0), *NumberOrAuto].
WholeOrAuto = (WrapValidator(_or_auto, json_schema_input_type=int | Literal["auto"]), _AS_IT_IS)
NumberOrAuto = (WrapValidator(_or_auto, json_schema_input_type=float | Literal["auto"]), _AS_IT_IS)
