"""What evaluation and chat need of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.conversation.render import Rendered

Tick = Callable[[float], None]


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood in nats of a row's tokens that carry weight, summed, and how many they are."""

    nll: float
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """Draw answers: `temperature` above 0, and the seed from which, with the prompt, all draws follow."""

    temperature: float
    seed: int


class Engine(Protocol):
    """A model that can be asked."""

    def generate(
        self,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop_ids: Sequence[int],
        tick: Tick,
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """Answers to prompts of token ids, in the prompts' order, each up to and without a stop id; greedy, unless
        they are to be drawn.

        `tick` is told how much more is done, in prompts (parts of one, too).
        """

    def score(self, rows: Sequence[Rendered], tick: Tick) -> list[Score]:
        """How likely each row's weighted tokens are. `tick` is told how many more rows are done."""

    def embed(self, rows: Sequence[list[int]], tick: Tick) -> Any:
        """The mean of the last states of each row of token ids: numpy [R, D]."""

    def likeliest(self, rows: Sequence[Rendered], at: Sequence[Any] | None, k: int, tick: Tick) -> list[Any]:
        """Log-probabilities at each weighted token of each row, as (ids [N, k], log-probabilities [N, k]) of numpy:
        of the k likeliest tokens, or of those given in `at`, one [N, k] a row."""

    def stream(
        self, prompt: list[int], max_new_tokens: int, stop_ids: Sequence[int], on_token: Callable[[int], None]
    ) -> list[int]:
        """One greedy answer, each token handed to `on_token` as it comes."""
