"""What every way of making rows has, and the sieve that what it makes goes through."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from tunesmith.conversation.message import KINDS, Conversation, Message
from tunesmith.section import Section

# Answers of a model to lists of messages, in their order; made by the pipeline of the run's own base model.
Answers = Callable[[Sequence[Sequence[Message]], int], list[str]]
WORDS = re.compile(r"\w+")
RUN = 3  # words in a shingle


@dataclass(frozen=True)
class Means:
    """What a way of making rows may use: the seed, and the run's base model."""

    seed: int
    answers: Answers | None = None


@dataclass
class Account:
    """What one way of making rows came to.

    Attributes:
        filtered: what came back and was not taken, by the reason why.
        tokens: that an endpoint counted, prompt and completion; `kept` those of replies that an earlier run paid for.
    """

    kind: str
    asked: int = 0
    made: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    cost: float | None = None

    def as_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = {"kind": self.kind, "asked": self.asked, "made": self.made}
        told |= {"filtered": dict(self.filtered)} if self.filtered else {}
        told |= {"tokens": dict(self.tokens)} if self.tokens else {}
        return told if self.cost is None else told | {"cost": round(self.cost, 6)}


class Making(Section):
    """A way of making rows: `data.augment[].kind`."""

    made_of: ClassVar[tuple[str, ...]] = tuple(KINDS)
    """Kinds of rows that it can start from."""

    @abstractmethod
    def make(self, rows: Sequence[Conversation], means: Means, account: Account) -> Iterator[Conversation]:
        """New rows; what was refused on the way is counted in `account`."""


def drawn(rows: Sequence[Conversation], share: float, seed: int, name: str) -> list[Conversation]:
    """A share of the rows, in their order, drawn by the seed and the name of what is made of them."""
    wanted = min(len(rows), max(round(share * len(rows)), 1))
    chosen = np.random.default_rng([seed, len(rows), *name.encode()]).permutation(len(rows))[:wanted]
    return [rows[i] for i in sorted(chosen.tolist())]


def plain(text: str) -> str:
    """A text's words in lower case."""
    return " ".join(WORDS.findall(text.casefold()))


class Seen:
    """Texts that were there before, to tell what is too much like one of them (Jaccard similarity of word runs)."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._shingles: list[frozenset[str]] = []
        self._where: dict[str, list[int]] = {}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        found = runs(text)
        for run in found:
            self._where.setdefault(run, []).append(len(self._shingles))
        self._shingles.append(found)

    def like(self, text: str) -> float:
        """The similarity of the most similar text, 0 to 1."""
        found = runs(text)
        shared = Counter(i for run in found for i in self._where.get(run, ()))
        return max((n / len(found | self._shingles[i]) for i, n in shared.most_common(50)), default=0.0)


def runs(text: str) -> frozenset[str]:
    """A text's runs of three words; of fewer words, the whole text."""
    words = plain(text).split()
    return frozenset(" ".join(words[i : i + RUN]) for i in range(max(len(words) - RUN + 1, 1)))
