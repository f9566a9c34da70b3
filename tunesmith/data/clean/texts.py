"""The texts of a row of any kind: changed by a function, or joined to be looked at."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from tunesmith.conversation.message import ROLES, Conversation, Message, Preference, Text
from tunesmith.data.section import MARKS

SIDES = {"prompt": ("user",), "answer": ("assistant",), "both": ("user", "assistant")}


def map_texts(row: Conversation, change: Callable[[str], str], roles: Collection[str] = ROLES) -> Conversation:
    """The row with `change` applied to what these roles say; the row itself where that changes nothing. A plain text
    counts as anybody's."""
    changed = row.map_texts(lambda m: change(m.content) if m.role in roles or m.role == "text" else m.content)
    return row if changed is row or changed == row else changed


def map_all(row: Conversation, change: Callable[[str], str]) -> Conversation:
    """The row with `change` applied to every text in it: what is said, thought, given to tools, and kept."""

    def deep(value: Any) -> Any:
        if isinstance(value, str):
            return change(value)
        if isinstance(value, list | tuple):
            return type(value)(map(deep, value))
        return {k: deep(v) for k, v in value.items()} if isinstance(value, dict) else value

    def more(message: Message) -> Message:
        kept = {k: v for k, v in message.more.items() if k not in ("tool_calls", "reasoning_content")}
        mapped = {k: v for k, v in message.more.items() if k not in kept}
        for call in mapped.get("tool_calls", ()):
            if isinstance(call.get("function"), dict):
                function = call["function"] | {"arguments": deep(call["function"].get("arguments"))}
                mapped["tool_calls"] = [
                    c if c is not call else call | {"function": function} for c in mapped["tool_calls"]
                ]
        if "reasoning_content" in mapped:
            mapped["reasoning_content"] = deep(mapped["reasoning_content"])
        return replace(message, more=kept | mapped) if mapped else message

    changed = map_texts(row, change)
    metadata = {k: v if k in MARKS else deep(v) for k, v in changed.metadata.items()}
    changed = replace(changed, messages=tuple(map(more, changed.messages)), metadata=metadata)
    if isinstance(changed, Preference):
        changed = replace(changed, rejected=tuple(map(more, changed.rejected)))
    return row if changed == row else changed


def texts(row: Conversation, roles: Collection[str] = ROLES) -> list[str]:
    """What these roles say, in order; a plain text counts as anybody's."""
    if isinstance(row, Text):
        return [row.text]
    rejected = row.rejected if isinstance(row, Preference) else ()
    return [m.content for m in (*row.messages, *rejected) if m.role in roles]


def media_of(row: Conversation) -> str:
    """What tells rows with other images or sounds apart; nothing for a row without."""
    return "".join(one.told for one in row.media)


def text_of(row: Conversation, side: str) -> str:
    """A side of the row as one text: `prompt`, `answer`, or `both`."""
    if isinstance(row, Text):
        return row.text
    answer = row.answer
    if isinstance(row, Preference):
        answer = "\n".join(m.told for m in (*row.messages[row.shared :], *row.rejected))
    if side == "prompt":
        return row.question
    return answer if side == "answer" else f"{row.question}\n{answer}"
