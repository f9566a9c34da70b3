"""How many tokens rows have, how many of them carry loss, and how well they pack."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Rendered, Renderer

QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99}


class Counting:
    """A renderer that remembers the lengths of what it wrote, so that nothing is written twice to be counted."""

    def __init__(self, renderer: Renderer | Counting) -> None:
        self._renderer = renderer
        self._known: dict[int, tuple[Conversation, int, int]] = {}  # the row is kept, so that its id stays its own

    def render(self, conversation: Conversation) -> Rendered:
        rendered = self._renderer.render(conversation)
        self._known[id(conversation)] = (conversation, len(rendered), rendered.trained)
        return rendered

    def lengths(self, row: Conversation) -> list[tuple[int, int]]:
        """(tokens, tokens that carry loss) of each of a row's conversations, of its words alone."""
        found = []
        for conversation in row.words.conversations:
            if id(conversation) not in self._known:
                self.render(conversation)
            found.append(self._known[id(conversation)][1:])
        return found

    def forget(self) -> None:
        self._known.clear()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)


def tokens(found: np.ndarray, max_length: int) -> dict[str, Any] | None:
    """Totals, a histogram (rows by length up to each power of two), and what packing makes of the rows.

    `packed` is the share of real tokens where rows are laid end to end into sequences of `max_length`, best fit first
    (Ding et al. 2024); `padded` where all were filled up to the longest. None of plain texts, which are cut anyway.

    Args:
        found: each conversation's tokens, and those that carry loss, shape [conversations, 2].
    """
    if not len(found):
        return None
    found = found.astype(np.int64)
    lengths, total = found[:, 0], int(found[:, 0].sum())
    edges = [2**n for n in range(4, 32) if 2**n < 2 * int(lengths.max())] or [16]
    upto = {str(edge): int(((lengths <= edge) & (lengths > edge // 2 * (edge > 16))).sum()) for edge in edges}
    return {
        "total": total,
        "trained": int(found[:, 1].sum()),
        "trained share": round(float(found[:, 1].sum() / total), 4),
        "shortest": int(lengths.min()),
        **{name: int(np.quantile(lengths, q, method="nearest")) for name, q in QUANTILES.items()},
        "longest": int(lengths.max()),
        "histogram": upto,
        "packed": round(total / (len(packed(lengths.tolist(), max_length)) * max_length), 4),
        "padded": round(total / (len(lengths) * int(lengths.max())), 4),
    }


def packed(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Lengths laid into sequences of `room` tokens: the longest first, each where it leaves the least (best fit)."""
    open_: dict[int, list[list[int]]] = {}  # sequences by the room that is left in them
    spaces: list[int] = []  # the keys of `open_`, sorted
    done: list[list[int]] = []

    def put(sequence: list[int], left: int) -> None:
        if left not in open_:
            open_[left] = []
            insort(spaces, left)
        open_[left].append(sequence)

    for length in sorted(lengths, reverse=True):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            sequence: list[int] = []
            left = room
            done.append(sequence)
        else:
            left = spaces[at]
            sequence = open_[left].pop()
            if not open_[left]:
                del open_[left], spaces[at]
        sequence.append(length)
        put(sequence, left - length)
    return done
