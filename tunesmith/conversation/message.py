"""Messages and conversations. Every source layout is turned into these at the door."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `weight` scales the loss on an assistant's turn; 0 leaves it out."""

    role: str
    content: str
    weight: float = 1.0

    def for_template(self) -> dict[str, str]:
        """What a chat template is given."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Conversation:
    """Messages in order, with where they came from (`id`, "file:row") and what else the row said."""

    messages: tuple[Message, ...]
    id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The last assistant's text: what evaluation compares with."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")

    @property
    def prompt(self) -> tuple[Message, ...]:
        """Everything before the last assistant's turn."""
        last = max((i for i, m in enumerate(self.messages) if m.role == "assistant"), default=-1)
        return self.messages[: max(last, 0)]

    @property
    def question(self) -> str:
        """The users' texts up to the last answer: what makes two rows the same question."""
        return "\n".join(m.content for m in self.prompt if m.role != "system")

    def with_system(self, text: str) -> Conversation:
        """This conversation, opened by a system message unless it already has one."""
        if self.messages and self.messages[0].role == "system":
            return self
        return replace(self, messages=(Message("system", text), *self.messages))

    def as_dict(self) -> dict[str, Any]:
        messages = [m.for_template() | ({} if m.weight == 1.0 else {"weight": m.weight}) for m in self.messages]
        return {"id": self.id, "messages": messages} | ({"metadata": self.metadata} if self.metadata else {})

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Conversation:
        messages = tuple(Message(m["role"], m["content"], m.get("weight", 1.0)) for m in row["messages"])
        return cls(messages, row.get("id", ""), row.get("metadata", {}))
