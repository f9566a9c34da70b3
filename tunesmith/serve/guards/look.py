"""What guards find in a text, as it is written and as it reads."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.screen.escapes import View
from tunesmith.screen.inside import Cut
from tunesmith.serve.guards.guard import Ask, Finding, Guard

Seen = tuple[Guard, Finding]


async def seen(guards: Sequence[Guard], text: Sequence[View], role: str, ask: Ask) -> list[Seen]:
    """What each guard finds; places are of the text as it is written. A whole text is judged once, as it reads."""
    found: list[Seen] = []
    for guard in guards:
        for view in text[-1:] if guard.whole else text:
            for f in await guard.check(view.text, role, ask):
                found.append((guard, Finding(f.kind, view.places[f.start], view.places[f.end], f.instead)))
    return found


def to_redact(found: Sequence[Seen]) -> list[Cut]:
    """What is to be taken out."""
    return [(f.start, f.end, f.instead) for guard, f in found if guard.action == "redact"]


def to_block(found: Sequence[Seen]) -> str:
    """The kind of the first finding that blocks; "" if none does."""
    return min(((f.start, f.kind) for guard, f in found if guard.action == "block"), default=(0, ""))[1]
