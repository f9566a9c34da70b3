"""What evaluation and chat need of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tunesmith.conversation.render import Rendered

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood in nats of a row's tokens that carry weight, summed, and how many they are."""

    nll: float
    tokens: int


class Engine(Protocol):
    """A model that can be asked."""

    def generate(
        self, prompts: Sequence[list[int]], max_new_tokens: int, stop_ids: Sequence[int], tick: Tick
    ) -> list[list[int]]:
        """Greedy answers to prompts of token ids, in the prompts' order, each up to and without a stop id.

        `tick` is told how much more is done, in prompts (parts of one, too).
        """

    def score(self, rows: Sequence[Rendered], tick: Tick) -> list[Score]:
        """How likely each row's weighted tokens are. `tick` is told how many more rows are done."""

    def stream(
        self, prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int], on_token: Callable[[int], None]
    ) -> list[int]:
        """One greedy answer, each token handed to `on_token` as it comes."""
