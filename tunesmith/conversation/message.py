"""Messages, and the four kinds of rows made of them. Every source layout is turned into one of these at the door.

A preference is a conversation with a second, worse ending, and a rated answer is a conversation with a
verdict, so whatever works on conversations works on them; a plain text has no messages at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import is_not
from typing import Any, ClassVar, Self, TypeVar

from tunesmith.conversation.media import OBJECT, Media, as_parts, from_parts, pieces, together

ROLES = ("system", "user", "assistant", "tool")


T = TypeVar("T")


def _quickly(cls: type[T], **fields: Any) -> T:
    """An object with all its fields, as a frozen class's own __init__ makes it in three times as long."""
    made = cls.__new__(cls)
    made.__dict__.update(fields)
    return made


@dataclass(frozen=True)
class Message:
    """One turn. `weight` scales the loss on an assistant's turn; 0 leaves it out.

    Attributes:
        more: what else a chat template may want of a turn: OpenAI's `tool_calls`, `tool_call_id` and `name`, and
            `reasoning_content` for thinking apart from the answer.
        media: images and sounds, in the order in which they stand in `content` (conversation/media.py).
    """

    role: str
    content: str
    weight: float = 1.0
    more: dict[str, Any] = field(default_factory=dict)
    media: tuple[Media, ...] = ()

    @property
    def told(self) -> str:
        """The text, with images and sounds as what they hold: what makes two messages say the same."""
        if not self.media:
            return self.content
        return "".join(p if isinstance(p, str) else p.told for p in pieces(self.content, self.media))

    @property
    def words(self) -> Message:
        """The message without its images and sounds."""
        if not self.media:
            return self
        texts = [p for p in pieces(self.content, self.media) if isinstance(p, str)]
        return replace(self, content="".join(texts), media=())

    def for_template(self) -> dict[str, Any]:
        """What a chat template is given."""
        return {"role": self.role, "content": self.content} | self.more

    def as_dict(self) -> dict[str, Any]:
        content = as_parts(self.content, self.media) if self.media else self.content
        own = {"role": self.role, "content": content, **self.more}
        return own if self.weight == 1.0 else own | {"weight": self.weight}

    @classmethod
    def from_dict(cls, message: dict[str, Any]) -> Message:
        content = message["content"]
        media: tuple[Media, ...] = ()
        if isinstance(content, list):
            content, media = from_parts(content)
        if len(message) == 2:  # most messages
            return _quickly(cls, role=message["role"], content=content, weight=1.0, more={}, media=media)
        more = {k: v for k, v in message.items() if k not in ("role", "content", "weight")}
        return cls(message["role"], content, message.get("weight", 1.0), more, media)


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
            return last.told if last else ""
        return json.dumps([call["function"] for call in last.more["tool_calls"]], ensure_ascii=False)

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last assistant's turn."""
        for i in range(len(self.messages) - 1, -1, -1):
            if self.messages[i].role == "assistant":
                return self.messages[:i]
        return ()

    @property
    def question(self) -> str:
        """The users' texts up to the last answer: what makes two rows the same question."""
        return "\n".join([m.told for m in self.prompt if m.role != "system"])

    @property
    def media(self) -> tuple[Media, ...]:
        """The images and sounds of all messages."""
        return tuple([one for m in self.messages for one in m.media])

    @property
    def words(self) -> Self:
        """This row without its images and sounds; the row itself where it has none."""
        return self.map_messages(lambda m: m.words) if self.media else self

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """What the row has to render: itself, or each of its endings."""
        return (self,)

    def map_texts(self, change: Callable[[Message], str]) -> Self:
        """This row with every message's text replaced by what `change` makes of the message."""
        return self.map_messages(lambda m: _changed(m, change))

    def map_messages(self, change: Callable[[Message], Message]) -> Self:
        """This row with every message replaced by what `change` makes of it."""
        new = tuple(map(change, self.messages))
        return replace(self, messages=new) if any(map(is_not, new, self.messages)) else self

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

    @property
    def media(self) -> tuple[Media, ...]:
        return super().media + tuple(one for m in self.rejected for one in m.media)

    def map_messages(self, change: Callable[[Message], Message]) -> Self:
        changed, new = super().map_messages(change), tuple(map(change, self.rejected))
        return replace(changed, rejected=new) if any(map(is_not, new, self.rejected)) else changed

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
    messages = tuple([Message.from_dict(m) for m in row["messages"]])
    if len(row) == 2 and "id" in row:  # most rows
        return _quickly(Conversation, messages=messages, id=row["id"], metadata={}, tools=())
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


def _changed(message: Message, change: Callable[[Message], str]) -> Message:
    new = change(message)
    if message.media and new.count(OBJECT) != len(message.media):  # then between them, so that they stay
        found = pieces(message.content, message.media)
        texts = [change(replace(message, content=p, media=())) if isinstance(p, str) else p for p in found]
        new, _ = together(texts)
    return message if new == message.content else replace(message, content=new)
