"""Texts with JSON's escapes in them, as whoever reads the JSON will see them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

UNICODE = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}"
IN_TEXT = re.compile(UNICODE)
IN_JSON = re.compile(UNICODE + r'|\\["\\/bfnrt]')
LEVELS = 3  # JSON in a text in JSON
LONGEST = 12  # characters of an escape


@dataclass(frozen=True)
class View:
    """A text as it reads. `places[i]` is where its character i begins in what was written; the last is the end."""

    text: str
    places: Sequence[int]


def is_like_json(text: str) -> bool:
    """Whether a text begins as a JSON object or list does."""
    return text.lstrip()[:1] in ("{", "[")


def views(text: str, like_json: bool) -> list[View]:
    """The text as it was written, and as it reads once its escapes are read; again, where that leaves escapes.

    Args:
        like_json: all of JSON's escapes count; else those by number only, since a backslash has other uses.
    """
    found = [View(text, range(len(text) + 1))]
    while len(found) <= LEVELS and "\\" in found[-1].text:
        read = _read(found[-1], IN_JSON if like_json else IN_TEXT)
        if read is None:
            break
        found.append(read)
    return found


def _read(view: View, pattern: re.Pattern[str]) -> View | None:
    parts: list[str] = []
    places: list[int] = []
    at = 0
    for m in pattern.finditer(view.text):
        letter = json.loads(f'"{m.group()}"')
        parts += [view.text[at : m.start()], letter if not "\ud800" <= letter <= "\udfff" else "\ufffd"]
        places += [*view.places[at : m.start()], view.places[m.start()]]
        at = m.end()
    if not parts:
        return None
    return View("".join([*parts, view.text[at:]]), [*places, *view.places[at:]])


def outside(text: str, at: int) -> int:
    """The place itself, or the beginning of the escapes that it may stand in."""
    near = text.rfind("\\", max(0, at - LONGEST), at)
    at = at if near < 0 else near
    while at > 0 and text[at - 1] == "\\":
        at -= 1
    return at
