"""Rows of the layouts that people have -> messages.

A layout tells whether it fits a row by the row's columns, and turns the row into messages. The order of
the table in plugins.py is the order of detection.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, ClassVar

from tunesmith.conversation.message import Message
from tunesmith.data.section import SourceSection, placeholders

Row = dict[str, Any]
LARGEST_WEIGHT = 1_000_000
COMPLETIONS = ("completion", "response", "output", "answer", "target")


class Unusable(Exception):
    """A row that can't become a conversation: a reason code and what is wrong with it."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason, self.why = reason, why


class Layout:
    """How one kind of row is read."""

    name: ClassVar[str]
    needs: ClassVar[str]
    takes_template: ClassVar[bool] = True

    @classmethod
    def fits(cls, row: Row) -> bool:
        raise NotImplementedError

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        raise NotImplementedError


class Chat(Layout):
    """`messages: [{role, content}, ...]`, as OpenAI has it."""

    name, needs, takes_template = "chat", "messages", False

    @classmethod
    def fits(cls, row: Row) -> bool:
        return isinstance(row.get("messages"), list)

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        return [_message(m, "role", "content", {"developer": "system"}) for m in _list(row, "messages")]


class ShareGpt(Layout):
    """`conversations: [{from, value}, ...]`, with an optional `system`."""

    name, needs, takes_template = "sharegpt", "conversations", False
    ROLES: ClassVar[dict[str, str]] = {
        "human": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "bot": "assistant",
        "model": "assistant",
        "bing": "assistant",
        "bard": "assistant",
    }

    @classmethod
    def fits(cls, row: Row) -> bool:
        turns = row.get("conversations")
        return isinstance(turns, list) and all(isinstance(t, dict) and "from" in t for t in turns)

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        turns = [_message(t, "from", "value", cls.ROLES) for t in _list(row, "conversations")]
        return _system(row, "system") + turns


class Instruction(Layout):
    """`instruction`, optional `input` or `context`, and `output` or `response`, as Alpaca and Dolly have it."""

    name, needs = "instruction", "instruction and output (or response)"

    @classmethod
    def fits(cls, row: Row) -> bool:
        return "instruction" in row and _first(row, COMPLETIONS) is not None

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        history: list[Message] = []
        turns = row.get("history") or []
        for turn in turns if isinstance(turns, list) else [turns]:
            if not (isinstance(turn, list) and len(turn) == 2):
                raise Unusable("bad_history", "history must be a list of [question, answer]")
            history += [Message("user", str(turn[0])), Message("assistant", str(turn[1]))]
        asked = _joined(row, ("instruction", "input", "context"), source)
        return [
            *_system(row, "system"),
            *history,
            *_pair(asked, _value(row, _first(row, COMPLETIONS) or "output")),
        ]


class Prompt(Layout):
    """`prompt` and `completion` (or response, output, answer, target), with an optional `context`."""

    name, needs = "prompt", "prompt and completion (or response, output, answer, target)"

    @classmethod
    def fits(cls, row: Row) -> bool:
        return isinstance(row.get("prompt"), str) and _first(row, COMPLETIONS) is not None

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        asked = _joined(row, ("context", "prompt"), source)
        return _system(row, "system") + _pair(asked, _value(row, _first(row, COMPLETIONS) or "completion"))


class Question(Layout):
    """`question` and `answer`, with an optional `context`."""

    name, needs = "question", "question and answer"

    @classmethod
    def fits(cls, row: Row) -> bool:
        return "question" in row and _first(row, ("answer", "response", "output")) is not None

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        asked = _joined(row, ("context", "question"), source)
        answer = _value(row, _first(row, ("answer", "response", "output")) or "answer")
        return _system(row, "system") + _pair(asked, answer)


class Columns(Layout):
    """Any columns, named in the recipe."""

    name, needs = "columns", "the columns that the recipe names"

    @classmethod
    def fits(cls, row: Row) -> bool:
        return False  # only ever named, never guessed

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        columns = source.columns
        assert columns is not None  # the section refuses layout columns without them
        asked = _joined(row, [c for c in (columns.context, columns.prompt) if c], source)
        return (_system(row, columns.system) if columns.system else []) + _pair(asked, _value(row, columns.completion))


def _list(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    if value is None:
        raise _lacks(row, column)
    if not isinstance(value, list):
        raise Unusable("bad_message", f"'{column}' is not a list of messages")
    return value


def _lacks(row: Row, column: str) -> Unusable:
    return Unusable("lacks_field", f"lacks '{column}' (it has: {', '.join(row) or 'nothing'})")


def _message(turn: Any, role_key: str, text_key: str, names: dict[str, str]) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str) or text_key not in turn:
        raise Unusable("bad_message", f"a message must have '{role_key}' and '{text_key}'")
    role = names.get(turn[role_key].lower(), turn[role_key].lower())
    if role not in ("system", "user", "assistant"):
        raise Unusable("unknown_role", f"role '{turn[role_key]}' is not system, user or assistant")
    if turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("tool_calls", "calls a tool, which a text conversation can't hold")
    weight = turn.get("weight", 1)
    if not isinstance(weight, int | float) or not 0 <= weight <= LARGEST_WEIGHT:
        raise Unusable("bad_weight", f"weight {weight!r} is not a number from 0 to {LARGEST_WEIGHT:,}")
    return Message(role, _content(turn[text_key]), float(weight))


def _content(value: Any) -> str:
    """A message's text: a string, or OpenAI's list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        return "".join(str(p.get("text", "")) for p in value)
    raise Unusable("not_text", f"a message's content is {type(value).__name__}, not text")


def _first(row: Row, names: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


def _value(row: Row, column: str) -> str:
    """A column as text. Objects and lists are written as compact JSON, which is how a model would give them."""
    if column not in row or row[column] is None:
        raise _lacks(row, column)
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return str(value)


def _system(row: Row, column: str) -> list[Message]:
    return [Message("system", str(row[column]))] if row.get(column) else []


def _joined(row: Row, columns: Iterable[str], source: SourceSection) -> str:
    """The user's text: the source's template filled in, or the columns that there are, a blank line apart."""
    if source.template is not None:
        return "".join(text + (_value(row, name) if name else "") for text, name in placeholders(source.template))
    columns = list(columns)
    main = [c for c in columns if c not in ("input", "context")]
    for column in main:
        _value(row, column)
    return "\n\n".join(_value(row, c) for c in columns if row.get(c))


def _pair(asked: str, answer: str) -> list[Message]:
    return [Message("user", asked), Message("assistant", answer)]
