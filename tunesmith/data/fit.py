"""Rows that fit the model, and what becomes of those that don't."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tunesmith.conversation.message import Conversation, Message, Preference
from tunesmith.conversation.render import Renderer
from tunesmith.data.engines.engine import Running
from tunesmith.data.ledger import NAMED_AT_MOST, Ledger, Saved, named
from tunesmith.data.shelf import Places, Rows, Shelf, joined
from tunesmith.data.tokens import Counting
from tunesmith.data.unusable import Unusable
from tunesmith.errors import DataError, ModelError
from tunesmith.progress import bar


@dataclass(frozen=True)
class Fit:
    """How rows are written as tokens, and how many they may have."""

    renderer: Renderer | Counting
    max_length: int


@dataclass(frozen=True)
class Measured:
    """What was made of some rows.

    Attributes:
        places: of the rows that fit.
        lengths: tokens, and tokens that carry loss, of each of their conversations; shape [conversations, 2].
        conversations: how many each row has, shape [rows].
        specials: special tokens in what users say.
        too_long: of rows that are too long where that is an error: how many, the longest, and the first of them.
    """

    places: Places
    lengths: np.ndarray
    conversations: np.ndarray
    specials: int
    ledger: Saved
    too_long: tuple[int, int, list[dict[str, str]]]


@dataclass(frozen=True)
class Measure:
    """Holds rows against the model's length: what fits stays, the policy (`data.over_length`) says what becomes of the
    others. The item is (a shard's number, rows)."""

    shelf: Shelf
    fit: Fit
    policy: str

    def __call__(self, item: tuple[int, Rows]) -> Measured:
        shard, rows = item
        ledger, counting = Ledger(self.shelf.folder), Counting(self.fit.renderer)
        fit = replace(self.fit, renderer=counting)
        places: list[int] = []
        lengths: list[tuple[int, int]] = []
        conversations: list[int] = []
        specials, count, longest = 0, 0, 0
        first: list[dict[str, str]] = []
        with self.shelf.writer(shard) as writer:
            for place, row in zip(rows.places.tolist(), rows, strict=True):
                kept, over = _fitted(row, self.policy, fit, ledger)
                if over:
                    count, longest = count + 1, max(longest, over)
                    if len(first) < NAMED_AT_MOST:
                        first.append({"row": row.id, "why": _too_long(over, fit)})
                for one in kept:
                    places.append(place if one is row else writer.add(one))
                    found = counting.lengths(one)
                    lengths += found
                    conversations.append(len(found))
                    specials += self.fit.renderer.specials_in(one)
                counting.forget()
        saved = ledger.save(self.shelf.folder / f"fit-{shard}")
        return Measured(
            np.array(places, dtype=np.int64),
            np.array(lengths, dtype=np.int32).reshape(-1, 2),
            np.array(conversations, dtype=np.int32),
            specials,
            saved,
            (count, longest, first),
        )


@dataclass(frozen=True)
class Lengths:
    """Lengths of measured rows, to be found by their places."""

    places: Places
    starts: np.ndarray
    lengths: np.ndarray

    def of(self, rows: Rows, renderer: Renderer) -> np.ndarray:
        """Of all these rows' conversations, shape [conversations, 2]; rows that were made since are measured now."""
        at = np.searchsorted(self.places, rows.places)
        at[at == len(self.places)] = 0
        known = self.places[at] == rows.places if len(self.places) else np.zeros(len(rows), dtype=bool)
        begins, ends = self.starts[at[known]], self.starts[at[known] + 1]
        most = int((ends - begins).max()) if len(begins) else 0
        taken = [self.lengths[(begins + i)[begins + i < ends]] for i in range(most)]
        counting = Counting(renderer)
        for row in rows[~known]:
            taken.append(np.array(counting.lengths(row), dtype=np.int32).reshape(-1, 2))
            counting.forget()
        return np.concatenate([np.empty((0, 2), dtype=np.int32), *taken])


def measured(
    parts: dict[str, Rows], policy: str, fit: Fit, engine: Running, shelf: Shelf, ledger: Ledger
) -> tuple[dict[str, Rows], Lengths, int]:
    """Every part's rows that fit, their lengths, and how many special tokens users say in them.

    Raises:
        DataError: rows are too long, and the policy is to stop there.
    """
    every: list[Measured] = []
    fitting: dict[str, Rows] = {}
    with bar("Measuring rows", sum(map(len, parts.values()))) as progress:
        for part, rows in parts.items():
            items = [(shelf.number(), piece) for piece in rows.chunks()]
            found: list[Measured] = []
            for (_, piece), one in zip(items, engine.map(Measure(shelf, fit, policy), items, len(rows)), strict=True):
                ledger.add(one.ledger)
                found.append(one)
                progress.advance(len(piece))
            _raise_too_long([one.too_long for one in found], len(rows))
            fitting[part] = joined((Rows(shelf, one.places) for one in found), shelf)
            every += found
    places = np.concatenate([np.empty(0, dtype=np.int64), *(one.places for one in every)])
    lengths = np.concatenate([np.empty((0, 2), dtype=np.int32), *(one.lengths for one in every)])
    counts = np.concatenate([np.empty(0, dtype=np.int32), *(one.conversations for one in every)])
    order = np.argsort(places, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)])[:-1][order]
    ends = np.concatenate([[0], np.cumsum(counts[order])])
    lengths = lengths[np.repeat(starts - ends[:-1], counts[order]) + np.arange(ends[-1])]
    return fitting, Lengths(places[order], ends, lengths), sum(one.specials for one in every)


def _raise_too_long(found: Sequence[tuple[int, int, list[dict[str, str]]]], rows: int) -> None:
    count = sum(n for n, _, _ in found)
    if not count:
        return
    first = [told for _, _, some in found for told in some][:NAMED_AT_MOST]
    raise DataError(
        f"{count} of {rows} rows are too long\n{named(first, count)}",
        where=first[0]["row"],
        fix=f"Raise train.max_length (the longest needs {max(length for _, length, _ in found)}), or say "
        "what to do with such rows: --set data.over_length=drop, truncate or split.",
    )


def _too_long(length: int, fit: Fit) -> str:
    return f"has {length} tokens, train.max_length is {fit.max_length}"


def _fitted(row: Conversation, policy: str, fit: Fit, ledger: Ledger) -> tuple[list[Conversation], int]:
    """What stays of a row, and its length where that is an error."""
    try:
        length = _measured(row, fit.renderer)
    except Unusable as error:
        ledger.reject(row.id, error.reason, error.why, json.dumps(row.as_dict(), ensure_ascii=False))
        return [], 0
    if length <= fit.max_length:
        return [row], 0
    if policy == "error":
        return [], length
    why = _too_long(length, fit)
    cuts = {"drop": _dropped, "truncate": _cut, "split": _dropped if isinstance(row, Preference) else _pieces}
    kept = cuts[policy](row, fit)
    if kept:
        ledger.cut.append({"row": row.id, "why": f"{why}: {_what_became(kept)}"})
    else:
        ledger.remove(row, row.id, "over_length", why)
    if len(kept) > 1:
        ledger.made["over_length"] += len(kept) - 1
    return kept, 0


def fits(row: Conversation, fit: Fit) -> bool:
    """Whether the model takes a row as it is."""
    try:
        return _measured(row, fit.renderer) <= fit.max_length
    except Unusable:
        return False


def _measured(row: Conversation, renderer: Renderer | Counting) -> int:
    """A row's length in tokens, of its words alone: of its longer ending where it has two; 0 of a plain text, which is
    cut anyway.

    Raises:
        Unusable: the model's template refuses it, leaves out a part of it, or leaves nothing in it to learn.
    """
    if (row.tools or any("tool_calls" in m.more for m in row.messages)) and not renderer.writes_tools:
        raise Unusable("no_tools", "this model's chat template writes no tools and calls of them")
    try:
        rendered = [renderer.render(conversation) for conversation in row.words.conversations]
    except ModelError as error:
        raise Unusable("refused_by_template", error.what) from error
    if not all(r.trained for r in rendered):
        raise Unusable("no_loss", "no token of it carries loss under the model's chat template")
    return max(map(len, rendered), default=0)


def _what_became(kept: Sequence[Conversation]) -> str:
    if len(kept) > 1:
        return f"cut into {len(kept)} rows"
    cut = kept[0].metadata.get("cut_characters")
    return f"{cut} characters cut off" if cut else "cut into 1 row"


def _dropped(row: Conversation, fit: Fit) -> list[Conversation]:
    return []


def _cut(row: Conversation, fit: Fit) -> list[Conversation]:
    """The row with the end of its longest message that is not an answer cut off, or nothing if that is not enough."""
    others = [i for i, m in enumerate(row.messages) if m.role != "assistant" and not m.media]
    if not others:
        return []
    longest = max(others, key=lambda i: len(row.messages[i].content))
    text = row.messages[longest].content

    def shortened(length: int) -> Conversation:
        message = replace(row.messages[longest], content=text[:length])
        messages = (*row.messages[:longest], message, *row.messages[longest + 1 :])
        return replace(row, messages=messages, metadata=row.metadata | {"cut_characters": len(text) - length})

    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _longest(shortened(middle), fit) <= fit.max_length:
            low = middle
        else:
            high = middle - 1
    return [shortened(low)] if low and _longest(shortened(low), fit) <= fit.max_length else []


def _longest(row: Conversation, fit: Fit) -> int:
    return max(len(fit.renderer.render(conversation)) for conversation in row.words.conversations)


def _pieces(row: Conversation, fit: Fit) -> list[Conversation]:
    """The row cut between turns into rows that fit, each with the system message; nothing if a turn is too long."""
    system = [m for m in row.messages[:1] if m.role == "system"]
    turns: list[list[Message]] = [[]]
    for message in row.messages[len(system) :]:
        turns[-1].append(message)
        if message.role == "assistant":
            turns.append([])
    pieces: list[list[Message]] = []
    for turn in filter(None, turns):
        longer = [*pieces[-1], *turn] if pieces else None
        if longer and _length(system + longer, fit) <= fit.max_length:
            pieces[-1] = longer
        elif _length(system + turn, fit) <= fit.max_length:
            pieces.append(turn)
        else:
            return []
    taught = [p for p in pieces if any(m.role == "assistant" and m.weight for m in p)]
    return [replace(row, messages=tuple(system + p), id=f"{row.id}#{i}") for i, p in enumerate(taught, 1)]


def _length(messages: list[Message], fit: Fit) -> float:
    try:
        return len(fit.renderer.render(Conversation(tuple(m.words for m in messages))))
    except ModelError:  # a template may refuse a piece, such as one that opens with an answer
        return math.inf
