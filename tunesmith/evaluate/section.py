"""The recipe's `evaluate` and `goal`."""

from __future__ import annotations

from pydantic import Field, field_validator

from tunesmith import plugins
from tunesmith.errors import nearest
from tunesmith.section import Section


def _known(name: str) -> str:
    if name not in plugins.known("metric"):
        raise ValueError(
            f"no metric is called '{name}'{nearest(name, plugins.known('metric'))}"
            f" (known: {', '.join(plugins.known('metric'))})"
        )
    return name


class GoalSection(Section):
    """What the fine-tune is for."""

    metric: str | None = None
    """The metric that decides the verdict; exact_match, accuracy or rouge_l by what the answers are, if not given."""

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str | None) -> str | None:
        return value if value is None else _known(value)


class EvaluateSection(Section):
    """How baseline and tuned model are compared on the test rows."""

    metrics: list[str] | None = None
    """Which to take; chosen by what the answers are, if not given."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer in tokens; a quarter more than the longest test answer, if not given."""
    rows: int | None = Field(None, ge=1)
    """Only so many test rows, drawn by seed; all if not given."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples behind each interval."""

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: list[str] | None) -> list[str] | None:
        return value if value is None else [_known(name) for name in value]
