"""What a training method is: rows become examples, and a batch of examples a loss.

A step's loss is a sum of terms. Each term is a sum over the step's examples, divided by the step's size of that
term (its tokens, its pairs), so that how a step is packed, accumulated or spread over ranks changes nothing.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from tunesmith.models.packed import PackedForward
    from tunesmith.models.packs import Pack
    from tunesmith.models.resolve import ResolvedModel


@dataclass(frozen=True)
class Example:
    """What the loop trains on at a time, made of a row.

    Attributes:
        row: the row's id.
        sequences: the token sequences that the loss needs together.
        beside: further ones that are only looked at, without gradient.
        target: a pair's margin, a verdict (1 or 0), a class's name.
        reference: the log-probabilities in nats that the model had of `sequences` and `beside` before training, each
            summed over its weighted tokens; empty until the loop has asked for them.
    """

    row: str
    sequences: tuple[Rendered, ...]
    beside: tuple[Rendered, ...] = ()
    target: Any = 0.0
    reference: tuple[float, ...] = ()

    def __len__(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences + self.beside))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences that are trained on."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class Batch:
    """Examples whose sequences lie in one pack, in order; what the method's `start` made known of the run, and what its
    `look` saw of the step."""

    examples: Sequence[Example]
    pack: Pack
    known: Any = None
    context: Any = None


@dataclass(frozen=True)
class Loss:
    """A batch's part of a step's loss.

    Attributes:
        terms: by name, each a sum over the batch; the loop divides it by the step's `sizes` of that name.
        told: figures to show beside the loss, each as a sum and of how many; the loop shows their mean.
    """

    terms: dict[str, Tensor]
    told: dict[str, tuple[float, float]] = field(default_factory=dict)


class Method(Section):
    """A training method."""

    kind: str
    takes: ClassVar[str] = "conversation"
    """The kind of rows that it learns from."""
    head: ClassVar[str] = "language"
    """What the model ends with: a `language` head, one score a class (`classes`) or one score (`reward`)."""

    @property
    def figures(self) -> dict[str, bool]:
        """What its losses tell beside their terms by which weights may be judged (`train.best_by`), and whether higher
        is better."""
        return {}

    @property
    def compares(self) -> bool:
        """Whether it needs the log-probabilities that the model had before training."""
        return False

    @property
    def models(self) -> dict[str, str]:
        """The identities of models that it learns from, by their keys: in others, training begins anew."""
        return {}

    def reads_along(self) -> tuple[ResolvedModel, str] | None:
        """A second model that is in memory in training and reads every row, with the precision of its weights."""
        return None

    @abstractmethod
    def encode(self, rows: Sequence[Conversation], renderer: Renderer, max_length: int) -> Iterator[list[Example]]:
        """The examples of each row, in order."""

    def suits(self, renderer: Renderer) -> None:
        """Raise a TunesmithError where the method can't be used with this model."""

    def classes(self, examples: Sequence[Example]) -> list[str]:
        """What the model's head tells apart, where it is not a language head."""
        return []

    def start(self, examples: Sequence[Example]) -> Any:
        """What the loss needs to know of all training examples, or to have loaded."""
        return None

    @abstractmethod
    def sizes(self, example: Example) -> dict[str, float]:
        """What an example adds to the number that each term of its step is divided by."""

    def look(self, forward: PackedForward, packs: Iterator[tuple[Sequence[Example], Pack]]) -> Any:
        """What the loss of a step's examples needs to know of all of them, without gradient. `packs` are the examples'
        `beside` sequences."""
        return None

    @abstractmethod
    def loss(self, forward: PackedForward, batch: Batch) -> Loss:
        """The batch's loss with its gradient."""


def log_probs(forward: PackedForward, pack: Pack) -> list[Tensor]:
    """Each sequence's log-probabilities [tokens that carry weight], in nats."""
    import torch

    counts = torch.bincount(pack.owner_N, minlength=len(pack.layout.rows)).tolist()
    return list((-forward.nll(pack)).split(counts))


def to_score(ids: list[int]) -> Rendered:
    """A sequence of which a head reads the model's state at the last token: the only one with weight."""
    return Rendered(ids, [0.0] * (len(ids) - 1) + [1.0])
