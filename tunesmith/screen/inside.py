"""What was found in a text, taken out of it. Texts that hold JSON are read as JSON, and stay it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence

from tunesmith.screen.escapes import IN_JSON, is_like_json, views

Cut = tuple[int, int, str]  # from, to, what stands there instead
SCALAR = re.compile(r'"(?:[^"\\]|\\.)*"|[^\s\[\]{},:"]+')


def replaced(text: str, find: Callable[[str], Sequence[Cut]]) -> str:
    """A text without what `find` finds in it, as it is written and as it reads once JSON's escapes are read."""
    found = []
    for view in views(text, is_like_json(text)):
        found += [(view.places[start], view.places[end], instead) for start, end, instead in find(view.text)]
    return cut_out(text, found)


def cut_out(text: str, cuts: Sequence[Cut], as_json: bool = True) -> str:
    """The text with marks in the place of cuts. Where cuts overlap, the first takes all of them.

    Of JSON objects and lists they are taken out of the keys and values, so that JSON is left: a number becomes a text.

    Args:
        as_json: False for a part of a text.
    """
    cuts = merged(cuts)
    return _in_json(text, cuts) if as_json and cuts and is_json(text) else _plain(text, cuts)


def merged(cuts: Sequence[Cut]) -> list[Cut]:
    """Cuts from first to last, of which none overlap."""
    found: list[Cut] = []
    for start, end, instead in sorted(cuts, key=lambda c: (c[0], -c[1])):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]), found[-1][2])
        elif start < end:
            found.append((start, end, instead))
    return found


def is_json(text: str) -> bool:
    """Whether a text is a JSON object or list that can be read; lists a thousand deep can't."""
    if not is_like_json(text):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _plain(text: str, cuts: Sequence[Cut]) -> str:
    parts, at = [], 0
    for start, end, instead in cuts:
        parts += [text[at:start], instead]
        at = end
    return "".join([*parts, text[at:]])


def _in_json(text: str, cuts: Sequence[Cut]) -> str:
    inside: list[Cut] = []
    first = 0
    for scalar in SCALAR.finditer(text):
        while first < len(cuts) and cuts[first][1] <= scalar.start():
            first += 1
        for number in range(first, len(cuts)):
            start, end, instead = cuts[number]
            if start >= scalar.end():
                break
            written = json.dumps(instead, ensure_ascii=False)
            if scalar.group()[0] != '"':
                inside.append((scalar.start(), scalar.end(), written))
                break
            start, end = max(start, scalar.start() + 1), min(end, scalar.end() - 1)
            for escape in IN_JSON.finditer(text, scalar.start() + 1, scalar.end() - 1):  # none is left in part
                start = escape.start() if escape.start() < start < escape.end() else start
                end = escape.end() if escape.start() < end < escape.end() else end
            if start < end:
                inside.append((start, end, written[1:-1]))
    return _plain(text, merged(inside))
