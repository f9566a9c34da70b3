"""A text without what is nobody else's business."""

from __future__ import annotations

from tunesmith.screen.inside import in_json
from tunesmith.screen.personal import finder, personal
from tunesmith.screen.secrets import secrets

COUNTRIES = ("us", "uk")
THRESHOLD = 0.4


def hidden(text: str) -> str:
    """The text with marks in the place of personal data that has a pattern, and of secrets; JSON stays JSON."""
    return in_json(text, _plain)


def _plain(text: str) -> str:
    for _, secret in sorted(secrets(text), key=lambda s: -len(s[1])):
        text = text.replace(secret, "[SECRET]")
    parts, at = [], 0
    for found in personal(finder("none", COUNTRIES), text, THRESHOLD, ()):
        parts += [text[at : found.start], f"[{found.kind}]"]
        at = found.end
    return "".join([*parts, text[at:]])
