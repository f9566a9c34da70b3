"""What a guard is: it looks at a text and says where it holds what it is for."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
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

    span: ClassVar[int] = 200
    """Characters that a finding spans at most."""
    whole: ClassVar[bool] = False
    """Judges a text as a whole: what it finds is all of it."""
    asks: ClassVar[bool] = False
    """Asks a model."""

    @property
    def reach(self) -> int:
        """How many characters of a stream are held back."""
        return self.span

    def load(self) -> None:
        """Have what it takes in memory before the first request.

        Raises:
            TunesmithError: a library, file or model is missing.
        """

    @abstractmethod
    async def check(self, text: str, role: str, ask: Ask) -> list[Finding]:
        """What a text holds. `ask` gives a model's answer by its name."""


class TextGuard(Guard):
    """A guard that finds what it is for by itself."""

    quick: ClassVar[bool] = False
    """Takes microseconds, so that it needs no thread."""

    def load(self) -> None:
        self.find("Good morning.")

    @abstractmethod
    def find(self, text: str) -> list[Finding]:
        """What a text holds."""

    async def check(self, text: str, role: str, ask: Ask) -> list[Finding]:
        return self.find(text) if self.quick else await asyncio.to_thread(self.find, text)
