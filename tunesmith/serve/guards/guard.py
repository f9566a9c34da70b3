"""What a guard is: it looks at a text and says where it holds what it is for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tunesmith.conversation.message import Message
from tunesmith.section import Section

Ask = Callable[[str, Sequence[Message]], Awaitable[str]]


@dataclass(frozen=True)
class Finding:
    """Characters `start` to `end` of a text hold something of a kind; `instead` is what a redacted text has there."""

    kind: str
    start: int
    end: int
    instead: str


class Guard(Section):
    """A guard: what an item of `serve.guards` stands for."""

    kind: str
    action: Literal["block", "redact", "flag"] = "block"
    """block: refuse the request, or end the answer before it; redact: put a mark in its place; flag: only tell."""
    on: Literal["input", "output", "both"] = "both"
    """Whose texts: what is asked, or what is answered."""

    reach: ClassVar[int] = 200
    """Characters that a finding spans at most: so much of a stream is held back."""
    quick: ClassVar[bool] = False
    """Takes microseconds, so that it needs no thread."""

    def load(self) -> None:
        """Have what it takes in memory before the first request.

        Raises:
            TunesmithError: a library, file or model is missing.
        """
        self.find("Good morning.")

    def find(self, text: str) -> list[Finding]:
        """What a text holds."""
        raise NotImplementedError

    async def check(self, text: str, role: str, ask: Ask) -> list[Finding]:
        """The same, beside other requests. `ask` gives a model's answer by its name."""
        return self.find(text) if self.quick else await asyncio.to_thread(self.find, text)
