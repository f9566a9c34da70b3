"""Messages, and the four kinds of rows made of them. Every source layout is turned into one of these at the door.

A preference is a conversation with a second, worse ending, and a rated answer is a conversation with a
verdict, so whatever works on conversations works on them; a plain text has no messages at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `weight` scales the loss on an assistant's turn; 0 leaves it out.

    Attributes:
        more: what else a chat template may want of a turn: OpenAI's `tool_calls`, `tool_call_id` and `name`, and
            `reasoning_content` for thinking apart from the answer.
    """

    role: str
    content: str
    weight: float = 1.0
    more: dict[str, Any] = field(default_factory=dict)

    def for_template(self) -> dict[str, Any]:
        """What a chat template is given."""
        return {"role": self.role, "content": self.content} | self.more

    def as_dict(self) -> dict[str, Any]:
        return self.for_template() | ({} if self.weight == 1.0 else {"weight": self.weight})

    @classmethod
    def from_dict(cls, message: dict[str, Any]) -> Message:
        if len(message) == 2:  # most messages
            return cls(message["role"], message["content"])
        more = {k: v for k, v in message.items() if k not in ("role", "content", "weight")}
        return cls(message["role"], message["content"], message.get("weight", 1.0), more)


@dataclass(frozen=True)
class Conversation:
    """Messages in order, with where they came from (`id`, "file:row") and what else the row said.

    Attributes:
        tools: definitions of what the assistant may call, as OpenAI has them.
    """

    kind: ClassVar[str] = "conversation"

    messages: tuple[Message, ...]
    id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def answer(self) -> str:
        """The last assistant's text, or its calls of tools as JSON: what evaluation compares with."""
        last = next((m for m in reversed(self.messages) if m.role == "assistant"), None)
        if last is None or last.content or "tool_calls" not in last.more:
            return last.content if last else ""
        return json.dumps([call["function"] for call in last.more["tool_calls"]], ensure_ascii=False)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last assistant's turn."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=-1)
        return self.messages[: max(last, 0)]

    @property
    def question(self) -> str:
        """The users' texts up to the last answer: what makes two rows the same question."""
        return "\n".join(m.content for m in self.prompt if m.role != "system")

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """What the row has to render: itself, or each of its endings."""
        return (self,)

    def map_texts(self, change: Callable[[Message], str]) -> Self:
        """This row with every message's text replaced by what `change` makes of the message."""
        return replace(self, messages=_changed(self.messages, change))

    def with_system(self, text: str) -> Self:
        """This row, opened by a system message unless it already has one."""
        if self.messages and self.messages[0].role == "system":
            return self
        return replace(self, messages=(Message("system", text), *self.messages))

    def as_dict(self) -> dict[str, Any]:
        own = {"id": self.id, "messages": [m.as_dict() for m in self.messages]} | self._more()
        own |= {"tools": list(self.tools)} if self.tools else {}
        return own | ({"metadata": self.metadata} if self.metadata else {})

    def _more(self) -> dict[str, Any]:
        """What this kind of row has besides messages."""
        return {}


@dataclass(frozen=True)
class Preference(Conversation):
    """A conversation with the better ending, and the worse one that could stand in its place.

    Attributes:
        rejected: the worse ending: the messages after those that both have in common.
        margin: by how much the better one is better, where that is known.
    """

    kind: ClassVar[str] = "preference"

    rejected: tuple[Message, ...] = ()
    shared: int = 0
    margin: float | None = None

    @property
    def prompt(self) -> tuple[Message, ...]:
        """What both endings follow."""
        return self.messages[: self.shared]

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """The better and the worse conversation; only the endings carry weight."""
        prompt = tuple(replace(m, weight=0.0) for m in self.prompt)
        endings = (self.messages[self.shared :], self.rejected)
        return tuple(Conversation(prompt + ending, self.id, self.metadata, self.tools) for ending in endings)

    def map_texts(self, change: Callable[[Message], str]) -> Self:
        return replace(super().map_texts(change), rejected=_changed(self.rejected, change))

    def with_system(self, text: str) -> Self:
        opened = super().with_system(text)
        return opened if opened is self else replace(opened, shared=self.shared + 1)

    def _more(self) -> dict[str, Any]:
        more = {"rejected": [m.as_dict() for m in self.rejected], "shared": self.shared}
        return more if self.margin is None else more | {"margin": self.margin}


@dataclass(frozen=True)
class Rated(Conversation):
    """A conversation whose last answer somebody found good, or not."""

    kind: ClassVar[str] = "rated"

    good: bool = True

    def _more(self) -> dict[str, Any]:
        return {"good": self.good}


@dataclass(frozen=True)
class Text(Conversation):
    """Plain text to go on learning the language from. It has no messages."""

    kind: ClassVar[str] = "text"

    text: str = ""

    @property
    def question(self) -> str:
        return self.text

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        return ()

    def map_texts(self, change: Callable[[Message], str]) -> Self:
        return replace(self, text=change(Message("text", self.text)))

    def with_system(self, text: str) -> Self:
        return self

    def _more(self) -> dict[str, Any]:
        return {"text": self.text}


KINDS = {kind.kind: kind for kind in (Conversation, Preference, Rated, Text)}


def row_from_dict(row: dict[str, Any]) -> Conversation:
    """A row of any kind from what its `as_dict` gave."""
    messages = tuple(map(Message.from_dict, row["messages"]))
    common: dict[str, Any] = {"messages": messages, "id": row.get("id", ""), "metadata": row.get("metadata", {})}
    common["tools"] = tuple(row.get("tools", ()))
    if "rejected" in row:
        rejected = tuple(map(Message.from_dict, row["rejected"]))
        return Preference(**common, rejected=rejected, shared=row["shared"], margin=row.get("margin"))
    if "good" in row:
        return Rated(**common, good=row["good"])
    return Text(**common, text=row["text"]) if "text" in row else Conversation(**common)


def tags(rows: Sequence[Conversation]) -> dict[str, list[int]]:
    """The places of the rows of each tag, by tag: the tasks of a run. None where there are fewer than two tags."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        if row.metadata.get("tag") is not None:
            found.setdefault(row.metadata["tag"], []).append(place)
    return found if len(found) > 1 else {}


def _changed(messages: tuple[Message, ...], change: Callable[[Message], str]) -> tuple[Message, ...]:
    return tuple(m if (new := change(m)) == m.content else replace(m, content=new) for m in messages)
