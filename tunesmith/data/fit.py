"""Rows that fit the model, and what becomes of those that don't."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from tunesmith.conversation.message import Conversation, Message, Preference
from tunesmith.conversation.render import Renderer
from tunesmith.data.layouts import Unusable
from tunesmith.data.ledger import Ledger, named
from tunesmith.data.tokens import Counting
from tunesmith.errors import DataError, ModelError


@dataclass(frozen=True)
class Fit:
    """How rows are written as tokens, and how many they may have."""

    renderer: Renderer | Counting
    max_length: int


def fitting(
    rows: Sequence[Conversation], policy: str, fit: Fit, ledger: Ledger, advance: Callable[[], None]
) -> Iterator[Conversation]:
    """Rows that fit, and what the policy (`data.over_length`) makes of those that don't."""
    too_long: list[tuple[int, dict[str, str]]] = []
    for row in rows:
        advance()
        try:
            length = _measured(row, fit.renderer)
        except Unusable as error:
            ledger.reject(row.id, error.reason, error.why, json.dumps(row.as_dict(), ensure_ascii=False))
            continue
        if length <= fit.max_length:
            yield row
            continue
        why = f"has {length} tokens, train.max_length is {fit.max_length}"
        if policy == "error":
            too_long.append((length, {"row": row.id, "why": why}))
            continue
        cuts = {"drop": _dropped, "truncate": _cut, "split": _dropped if isinstance(row, Preference) else _pieces}
        kept = cuts[policy](row, fit)
        if kept:
            ledger.cut.append({"row": row.id, "why": f"{why}: {_what_became(kept)}"})
        else:
            ledger.remove(row, row.id, "over_length", why)
        ledger.made += max(len(kept) - 1, 0)
        yield from kept
    if too_long:
        raise DataError(
            f"{len(too_long)} of {len(rows)} rows are too long\n{named([told for _, told in too_long])}",
            where=too_long[0][1]["row"],
            fix=f"Raise train.max_length (the longest needs {max(length for length, _ in too_long)}), or say "
            "what to do with such rows: --set data.over_length=drop, truncate or split.",
        )


def fits(row: Conversation, fit: Fit) -> bool:
    """Whether the model takes a row as it is."""
    try:
        return _measured(row, fit.renderer) <= fit.max_length
    except Unusable:
        return False


def _measured(row: Conversation, renderer: Renderer | Counting) -> int:
    """A row's length in tokens: of its longer ending where it has two, and 0 of a plain text, which is cut anyway.

    Raises:
        Unusable: the model's template refuses it, leaves out a part of it, or leaves nothing in it to learn.
    """
    if (row.tools or any("tool_calls" in m.more for m in row.messages)) and not renderer.writes_tools:
        raise Unusable("no_tools", "this model's chat template writes no tools and calls of them")
    try:
        rendered = [renderer.render(conversation) for conversation in row.conversations]
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
    others = [i for i, m in enumerate(row.messages) if m.role != "assistant"]
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
    return max(len(fit.renderer.render(conversation)) for conversation in row.conversations)


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
        return len(fit.renderer.render(Conversation(tuple(messages))))
    except ModelError:  # a template may refuse a piece, such as one that opens with an answer
        return math.inf
