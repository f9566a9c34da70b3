"""A model that judges: one that is served here or elsewhere, asked about each text."""

from __future__ import annotations

from typing import ClassVar, Literal

from tunesmith.conversation.message import Message
from tunesmith.serve.guards.guard import Ask, Finding, Guard


class GuardModel(Guard):
    """A guard model, such as Llama Guard: it is shown the text and answers `safe` or `unsafe` first."""

    kind: Literal["model"] = "model"
    model: str
    """A model that is served here, or another server's: https://host/v1#name."""
    prompt: str = "{text}"
    """What the model is asked; {text} is the text. A model that was not made for this needs instructions here."""
    unsafe: str = "unsafe"
    """What its answer begins with where the text must not pass, whatever the case."""

    span: ClassVar[int] = 600
    whole: ClassVar[bool] = True
    asks: ClassVar[bool] = True

    async def check(self, text: str, role: str, ask: Ask) -> list[Finding]:
        if not text.strip():
            return []
        asked = [Message("user", self.prompt.replace("{text}", text))]
        if role == "assistant" and self.prompt == "{text}":  # as guard models read an answer
            asked = [Message("user", ""), Message("assistant", text)]
        said = (await ask(self.model, asked)).strip()
        if not said.casefold().startswith(self.unsafe.casefold()):
            return []
        return [Finding("model", 0, len(text), "[REMOVED]")]
