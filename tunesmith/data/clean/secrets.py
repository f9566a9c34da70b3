"""`data.clean.secrets`: keys, tokens and passwords."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar, Literal

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import RowStep, Verdict
from tunesmith.data.clean.texts import map_all
from tunesmith.screen.inside import replaced
from tunesmith.screen.secrets import secret_cuts, secrets


class Secrets(RowStep):
    """Find API keys, tokens, passwords and private keys by detect-secrets' detectors. Nothing found is sent anywhere
    to be tried."""

    short: ClassVar[str] = "action"

    action: Literal["report", "mask", "drop"] = "drop"
    """report: count, and list the rows; mask: write [SECRET] in its place; drop: leave the row out."""
    entropy: bool = False
    """Take any long random string in quotes for a secret, too. Hashes and ids are random as well."""

    def look(self, row: Conversation) -> Verdict:
        found: list[str] = []

        def note(text: str) -> str:
            found.extend(kind for kind, _ in secrets(text, self.entropy))
            return text

        map_all(row, note)
        if not found:
            return Verdict(row)
        counted = dict(Counter(found))
        why = "holds " + ", ".join(counted)
        if self.action == "report":
            return Verdict(row, why, counted)
        return Verdict(None if self.action == "drop" else map_all(row, self.hide), why, counted)

    def hide(self, text: str) -> str:
        return text if self.action == "report" else replaced(text, lambda inner: secret_cuts(inner, self.entropy))
