"""Variants of what users say, made without a model: typing errors, case, noise. What is learnt stays as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tunesmith.conversation.message import Conversation, Message
from tunesmith.data.augment.base import Account, Making, Means, drawn

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEAR = {
    key: "".join(row[max(i - 1, 0) : i] + row[i + 1 : i + 2])
    for row in KEYBOARD
    for i, key in enumerate(row)
}  # fmt: skip


class Variant(Making):
    """A changed copy of a share of the rows. Not of plain texts: all that they say is learnt."""

    made_of: ClassVar[tuple[str, ...]] = ("conversation", "preference", "rated")

    share: float = Field(0.1, gt=0, le=1)
    """Of the training rows, drawn by the seed."""

    def make(self, rows: Sequence[Conversation], means: Means, account: Account) -> Iterator[Conversation]:
        for row in drawn(rows, self.share, means.seed, account.kind):
            random = np.random.default_rng([means.seed, *row.id.encode(), *account.kind.encode()])

            def changed(message: Message, random: Any = random) -> str:
                return self.changed(message.content, random) if message.role == "user" else message.content

            account.asked += 1
            made = row.map_texts(changed)
            yield replace(made, id=f"{row.id}~{account.kind}", metadata=row.metadata | _provenance(account.kind, row))

    @abstractmethod
    def changed(self, text: str, random: np.random.Generator) -> str:
        """A user's text, varied."""


def _provenance(kind: str, row: Conversation) -> dict[str, Any]:
    return {"made": {"by": kind, "from": row.id}}


class Typos(Variant):
    """Typing errors: letters swapped, left out, doubled, or hit beside their key."""

    kind: Literal["typos"] = "typos"
    rate: float = Field(0.03, gt=0, le=0.5)
    """Share of letters that go wrong."""

    def changed(self, text: str, random: np.random.Generator) -> str:
        letters = list(text)
        for i, letter in enumerate(text):
            if not letter.isalpha() or random.random() >= self.rate:
                continue
            near = NEAR.get(letter.lower(), "")
            how = int(random.integers(4))
            if how == 0 and i + 1 < len(letters) and text[i + 1].isalpha():
                letters[i], letters[i + 1] = letters[i + 1], letters[i]
            elif how == 1:
                letters[i] = ""
            elif how == 2 and near:
                hit = near[int(random.integers(len(near)))]
                letters[i] = hit.upper() if letter.isupper() else hit
            else:
                letters[i] = letter * 2
        return "".join(letters)


class Case(Variant):
    """All small, all capitals, or the first letter of each word."""

    kind: Literal["case"] = "case"

    def changed(self, text: str, random: np.random.Generator) -> str:
        ways = [w for w in (text.lower(), text.upper(), text.title()) if w != text]
        return ways[int(random.integers(len(ways)))] if ways else text


class Noise(Variant):
    """Punctuation left out, spaces doubled, words said twice."""

    kind: Literal["noise"] = "noise"
    rate: float = Field(0.1, gt=0, le=0.5)
    """Share of words that are touched."""

    def changed(self, text: str, random: np.random.Generator) -> str:
        words = []
        for word in text.split(" "):
            if word and random.random() < self.rate:
                bare = word.rstrip(".,;:!?")
                word = bare if bare and bare != word else (word + " " + word, word + " ")[int(random.integers(2))]
            words.append(word)
        return " ".join(words)
