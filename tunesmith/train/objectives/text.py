"""Continued pre-training: the cross-entropy of every token of plain texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from tunesmith.conversation.message import Conversation, Text
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.train.objectives.method import Example
from tunesmith.train.objectives.sft import Sft


class PlainText(Sft):
    """Learn the language of plain texts. A text longer than `train.max_length` is cut into chunks that do not overlap,
    as equal in length as can be; each chunk's first token is context only."""

    takes = "text"

    kind: Literal["text"] = "text"  # type: ignore[assignment]
    loss_on: Literal["text"] = "text"  # type: ignore[assignment]
    """Every token."""

    def encode(self, rows: Sequence[Conversation], renderer: Renderer, max_length: int) -> Iterator[list[Example]]:
        for row in rows:
            assert isinstance(row, Text)
            yield [Example(row.id, (chunk,)) for chunk in chunks(renderer.render_text(row), max_length)]


def chunks(whole: Rendered, longest: int) -> list[Rendered]:
    """A text in pieces of at most `longest` tokens that differ by one at most in length, so that no piece is too short
    to learn from."""
    count = -(-len(whole) // longest)
    ends = [len(whole) * i // count for i in range(count + 1)]
    return [
        Rendered(whole.ids[start:end], [0.0, *whole.weights[start + 1 : end]])
        for start, end in itertools.pairwise(ends)
    ]
