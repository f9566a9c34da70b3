"""Training, validation and test rows: by seed, stratified by label, never the same question on two sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tunesmith.conversation.message import Conversation


def same_question(row: Conversation) -> str:
    """What makes two rows ask the same: the users' text, whatever its case and spacing."""
    return " ".join(row.question.casefold().split())


def hold_out(
    rows: Sequence[Conversation], wanted: int, seed: int, by_label: bool
) -> tuple[list[Conversation], list[Conversation]]:
    """Split off `wanted` rows: (the rest, the part), both in the rows' order.

    Rows that ask the same question go together. With `by_label`, each answer's groups are spread evenly
    over the order in which groups are drawn (systematic sampling), so that every label gives its share.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(same_question(row), []).append(i)
    strata: dict[str, list[list[int]]] = {}
    for members in groups.values():
        strata.setdefault(rows[members[0]].answer if by_label else "", []).append(members)

    random = np.random.default_rng([seed, len(rows)])
    drawn: list[tuple[float, float, list[int]]] = []
    for members_of_label in strata.values():
        for place, which in enumerate(random.permutation(len(members_of_label))):
            rank = (place + random.random()) / len(members_of_label)
            drawn.append((rank, random.random(), members_of_label[which]))
    taken: set[int] = set()
    for _, _, members in sorted(drawn, key=lambda d: d[:2]):
        if len(taken) + len(members) <= wanted:
            taken.update(members)
    return (
        [row for i, row in enumerate(rows) if i not in taken],
        [row for i, row in enumerate(rows) if i in taken],
    )
