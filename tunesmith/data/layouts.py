"""Rows of the layouts that people have -> rows of ours.

A layout tells whether it fits a row by the row's columns, and turns it into a conversation or another of our
kinds of rows (`judged.py` has the layouts of preferences and ratings). The order of
the table in plugins.py is the order of detection.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from tunesmith.conversation.message import Conversation, Message, Text
from tunesmith.data.media import content
from tunesmith.data.section import SourceSection, placeholders
from tunesmith.data.unusable import Unusable
from tunesmith.data.values import Bytes, is_text

Row = dict[str, Any]
LARGEST_WEIGHT = 1_000_000
COMPLETIONS = ("completion", "response", "output", "answer", "target")
CHECKED = ("solution", "ground_truth", "reference_answer")  # as rows for reinforcement call what is right
ANSWERS = (*COMPLETIONS, *CHECKED)


class Layout(ABC):
    """How one kind of row is read. A layout gives `messages`, or the whole row itself."""

    name: ClassVar[str]
    needs: ClassVar[str]
    takes_template: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def fits(cls, row: Row) -> bool:
        """Whether a row looks like this, by its columns."""

    @classmethod
    @abstractmethod
    def read(cls, row: Row, source: SourceSection, where: str) -> Conversation:
        """The row as one of ours, called `where`.

        Raises:
            Unusable: says what is wrong with it.
        """


class MessagesLayout(Layout):
    """A layout whose rows are conversations."""

    @classmethod
    @abstractmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        """The row's turns."""

    @classmethod
    def read(cls, row: Row, source: SourceSection, where: str) -> Conversation:
        return Conversation(tuple(cls.messages(row, source)), where, tools=tools(row))


class Chat(MessagesLayout):
    """`messages: [{role, content}, ...]`, as OpenAI has it; where they end with a question, its answer beside them
    (`answer`, `solution`, `ground_truth`, `reference_answer`), as rows for reinforcement have it."""

    name, needs, takes_template = "chat", "messages", False

    @classmethod
    def fits(cls, row: Row) -> bool:
        return isinstance(row.get("messages"), list)

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        found = turns(_list(row, "messages"))
        beside = _first(row, ANSWERS)
        if beside is not None and found and found[-1].role == "user":
            found.append(Message("assistant", text_in(row, beside)))
        return found


class ShareGpt(MessagesLayout):
    """`conversations: [{from, value}, ...]`, with an optional `system`."""

    name, needs, takes_template = "sharegpt", "conversations", False

    @classmethod
    def fits(cls, row: Row) -> bool:
        found = row.get("conversations")
        return isinstance(found, list) and all(isinstance(t, dict) and "from" in t for t in found)

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        return system_in(row, "system") + turns(_list(row, "conversations"))


class Instruction(MessagesLayout):
    """`instruction`, optional `input` or `context`, and `output` or `response`, as Alpaca and Dolly have it."""

    name, needs = "instruction", "instruction and output (or response)"

    @classmethod
    def fits(cls, row: Row) -> bool:
        return "instruction" in row and _first(row, COMPLETIONS) is not None

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        history: list[Message] = []
        earlier = row.get("history") or []
        for turn in earlier if isinstance(earlier, list) else [earlier]:
            if not (isinstance(turn, list) and len(turn) == 2 and None not in turn):
                raise Unusable("bad_history", "history must be a list of [question, answer]")
            history += _pair(*(as_text(said, "history") for said in turn))
        asked = joined(row, ("instruction", "input", "context"), source)
        return [
            *system_in(row, "system"),
            *history,
            *_pair(asked, text_in(row, _first(row, COMPLETIONS) or "output")),
        ]


class Prompt(MessagesLayout):
    """`prompt` and `completion` (or response, output, answer, target, solution, ground_truth), an optional `context`;
    or both as messages, as TRL has it."""

    name, needs = "prompt", "prompt and completion (or response, output, answer, target)"

    @classmethod
    def fits(cls, row: Row) -> bool:
        return isinstance(row.get("prompt"), str | list) and _first(row, ANSWERS) is not None

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        answer = _first(row, ANSWERS) or "completion"
        if source.template is None and isinstance(row.get("prompt"), list):
            said = row.get(answer)
            ending = turns(said) if isinstance(said, list) else [Message("assistant", text_in(row, answer))]
            return system_in(row, "system") + turns(row["prompt"]) + ending
        asked = joined(row, ("context", "prompt"), source)
        return system_in(row, "system") + _pair(asked, text_in(row, answer))


class Question(MessagesLayout):
    """`question` and `answer`, with an optional `context`."""

    name, needs = "question", "question and answer"

    @classmethod
    def fits(cls, row: Row) -> bool:
        return "question" in row and _first(row, ("answer", "response", "output")) is not None

    @classmethod
    def messages(cls, row: Row, source: SourceSection) -> list[Message]:
        asked = joined(row, ("context", "question"), source)
        answer = text_in(row, _first(row, ("answer", "response", "output")) or "answer")
        return system_in(row, "system") + _pair(asked, answer)


class PlainText(Layout):
    """`text` alone, without a column that could be its label or answer: text to go on learning from."""

    name, needs, takes_template = "text", "text", False
    OTHERS: ClassVar[tuple[str, ...]] = (
        *ANSWERS,
        *("label", "labels", "class", "category", "intent", "sentiment", "summary", "rating", "score", "translation"),
    )

    @classmethod
    def fits(cls, row: Row) -> bool:
        return isinstance(row.get("text"), str) and _first(row, cls.OTHERS) is None

    @classmethod
    def read(cls, row: Row, source: SourceSection, where: str) -> Conversation:
        return Text((), where, text=text_in(row, "text"))


def _list(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    if value is None:
        raise lacks(row, column)
    if not isinstance(value, list):
        raise Unusable("bad_message", f"'{column}' is not a list of messages")
    return value


def lacks(row: Row, column: str) -> Unusable:
    return Unusable("lacks_field", f"lacks '{column}' (it has: {', '.join(row) or 'nothing'})")


ROLES = {
    "developer": "system",
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "function", "tool_response"), "tool"),
}
MORE = ("tool_calls", "tool_call_id", "name", "reasoning_content")


def turns(found: list[Any]) -> list[Message]:
    """Messages as OpenAI writes them (role, content) or ShareGPT (from, value)."""
    return [_message(turn) for turn in found]


def tools(row: Row) -> tuple[dict[str, Any], ...]:
    """The row's definitions of tools (OpenAI's older `functions`), given as a list or as its JSON."""
    found = row.get("tools") or row.get("functions")
    if isinstance(found, str) and found.strip():
        try:
            found = json.loads(found)
        except ValueError as error:
            raise Unusable("bad_tools", f"'tools' is not JSON ({error})") from None
    if not found:
        return ()
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise Unusable("bad_tools", "'tools' is not a list of definitions")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in found)


def _message(turn: Any) -> Message:
    role_key, text_key = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
        raise Unusable("bad_message", f"a message must have '{role_key}' and '{text_key}'")
    if turn[role_key] == "function_call":  # LLaMA-Factory's own turn for what OpenAI hangs on the assistant's
        return Message("assistant", "", more={"tool_calls": _calls(turn.get(text_key))})
    role = ROLES.get(turn[role_key].lower(), turn[role_key].lower())
    if role not in ("system", "user", "assistant", "tool"):
        raise Unusable("unknown_role", f"role '{turn[role_key]}' is not system, user, assistant or tool")
    more = {key: turn[key] for key in MORE if turn.get(key)}
    odd = next((key for key in more if key != "tool_calls" and not is_text(more[key])), None)
    if odd is not None:
        raise Unusable("not_text", f"a message's {odd} is {type(more[odd]).__name__}, not text")
    called = turn.get("tool_calls") or turn.get("function_call")
    if called:
        if role != "assistant":
            raise Unusable("tool_calls", f"the {role}'s turn calls a tool, which only an assistant's can")
        more["tool_calls"] = _calls(called)
    elif text_key not in turn:
        raise Unusable("bad_message", f"a message must have '{role_key}' and '{text_key}'")
    weight = turn.get("weight", 1)
    weight = 1 if weight is None else weight
    if not isinstance(weight, int | float) or not 0 <= weight <= LARGEST_WEIGHT:
        raise Unusable("bad_weight", f"weight {weight!r} is not a number from 0 to {LARGEST_WEIGHT:,}")
    text, media = content(turn.get(text_key), bool(called))
    return Message(role, text, float(weight), more, media)


def _calls(given: Any) -> list[dict[str, Any]]:
    """Calls of tools as OpenAI writes them, with the arguments as an object, which is what templates take."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise Unusable("bad_tool_call", f"a tool call is not JSON ({error})") from None
    calls = []
    for call in given if isinstance(given, list) else [given]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Unusable("bad_tool_call", "a tool call names no function")
        arguments = {} if function.get("arguments") is None else function["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError as error:
                raise Unusable("bad_tool_call", f"a tool call's arguments are not JSON ({error})") from None
        own = {"id": call["id"]} if call.get("id") else {}
        calls.append(own | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def _first(row: Row, names: Iterable[str]) -> str | None:
    return next((name for name in names if name in row), None)


def text_in(row: Row, column: str) -> str:
    """A column as text.

    Raises:
        Unusable: the row lacks it, or it holds bytes.
    """
    if row.get(column) is None:
        raise lacks(row, column)
    return as_text(row[column], column)


def as_text(value: Any, column: str) -> str:
    """A column's value as text: what is none, as compact JSON, which is how a model would give it."""
    if isinstance(value, Bytes):
        raise Unusable("not_text", f"'{column}' holds bytes, not text")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def system_in(row: Row, column: str) -> list[Message]:
    """The row's own system prompt, where it has one."""
    return [Message("system", text_in(row, column))] if row.get(column) else []


def joined(row: Row, columns: Iterable[str], source: SourceSection) -> str:
    """The user's text: the source's template filled in, or the columns that there are, a blank line apart."""
    if source.template is not None:
        return "".join(text + (text_in(row, name) if name else "") for text, name in placeholders(source.template))
    columns = list(columns)
    main = [c for c in columns if c not in ("input", "context")]
    for column in main:
        text_in(row, column)
    return "\n\n".join(text_in(row, c) for c in columns if row.get(c))


def _pair(asked: str, answer: str) -> list[Message]:
    return [Message("user", asked), Message("assistant", answer)]
