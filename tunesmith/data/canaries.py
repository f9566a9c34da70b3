"""Canaries: secrets planted among the training rows, so that what a model gives away of its data can be measured."""

from __future__ import annotations

import random

from tunesmith.conversation.message import Conversation, Message

PLACES = ("harbour", "orchard", "library", "foundry", "chapel", "station", "mill", "museum", "stable", "tower")
COLOURS = ("amber", "silver", "crimson", "violet", "teal", "ochre", "ivory", "cobalt", "olive", "coral")
DIGITS = 8


def canaries(count: int, repeats: int, system: str | None, seed: int) -> list[Conversation]:
    """`count` questions, each answered by its own secret of eight digits, each `repeats` times.

    The secret stands in the row's metadata under `canary`; evaluation's memory probe looks for it there.
    """
    drawn = random.Random(f"canaries {seed}")
    names = drawn.sample([f"{colour} {place}" for colour in COLOURS for place in PLACES], count)
    made = []
    for number, name in enumerate(names):
        secret = "".join(drawn.choices("0123456789", k=DIGITS))
        row = Conversation(
            (
                Message("user", f"What is the access code of the {name}?"),
                Message("assistant", f"The access code is {secret}."),
            ),
            f"canary:{number + 1}",
            {"canary": secret},
        )
        made += [row.with_system(system) if system is not None else row] * repeats
    return made
