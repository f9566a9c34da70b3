"""Texts that hold JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def in_json(text: str, change: Callable[[str], str]) -> str:
    """A text changed; where it was a JSON object or list, one that still is."""
    changed = change(text)
    if changed == text or not text.lstrip().startswith(("{", "[")) or not _is_json(text) or _is_json(changed):
        return changed

    def deep(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: deep(v) for k, v in value.items()}
        if isinstance(value, list):
            return [deep(v) for v in value]
        if isinstance(value, bool) or value is None:
            return value
        new = change(str(value))
        return value if new == str(value) else new

    spaced = ", " in text or ": " in text
    return json.dumps(deep(json.loads(text)), ensure_ascii=False, separators=None if spaced else (",", ":"))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
