"""`data.clean.turns`: conversations with an empty or a one-sided turn."""

from __future__ import annotations

from dataclasses import replace

from tunesmith.conversation.message import Conversation, Message, Preference, Text
from tunesmith.data.clean.minhash import normalised
from tunesmith.data.clean.step import RowStep, Verdict


class Turns(RowStep):
    """Put conversations in order: empty messages go, turns of one side in a row become one, and a row whose answer only
    says the question again is left out. (A row without a prompt or an answer is rejected before any step.)"""

    join: bool = True
    """Join turns of the same side that follow one another, a blank line between them."""
    echoes: bool = True
    """Leave out rows whose answer says what the last user's turn said, and nothing else."""

    def look(self, row: Conversation) -> Verdict:
        if isinstance(row, Text | Preference):  # no turns, or two endings that must stay as they are
            return Verdict(row)
        messages: list[Message] = []
        for message in row.messages:
            if not message.content.strip() and not message.more:
                continue
            last = messages[-1] if messages else None
            alike = last and (last.role, last.weight, last.more) == (message.role, message.weight, {})
            if self.join and last and alike and not message.more:
                text = f"{last.content}\n\n{message.content}"
                messages[-1] = replace(last, content=text, media=last.media + message.media)
            else:
                messages.append(message)
        tidy = replace(row, messages=tuple(messages))
        asked = next((m.content for m in reversed(tidy.prompt) if m.role == "user"), "")
        if self.echoes and len(normalised(asked).split()) > 2 and normalised(asked) == normalised(tidy.answer):
            return Verdict(None, "the answer says the question again", {"echo": 1})
        if len(messages) == len(row.messages):
            return Verdict(row)
        return Verdict(tidy, f"{len(row.messages)} turns became {len(messages)}", {"put in order": 1})
