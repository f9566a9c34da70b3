"""What recipes say of models that are asked for money."""

from __future__ import annotations

from pydantic import Field

from tunesmith.section import Section


class PriceSection(Section):
    """What an endpoint takes for a million tokens."""

    prompt: float = Field(0.0, ge=0)
    """Of what is asked."""
    completion: float = Field(0.0, ge=0)
    """Of what is answered."""

    def cost(self, prompt: int, completion: int) -> float:
        """Of so many tokens."""
        return (prompt * self.prompt + completion * self.completion) / 1e6
