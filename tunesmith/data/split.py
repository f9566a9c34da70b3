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

    Rows that ask the same question go together, and so do the pieces of a row that was too long. With
    `by_label`, each answer's groups are spread evenly over the order in which groups are drawn (systematic
    sampling), so that every label gives its share.
    """
    strata: dict[str, list[list[int]]] = {}
    for members in _together(rows):
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


def _together(rows: Sequence[Conversation]) -> list[list[int]]:
    """Indices of rows in groups that must not be split: by question, and by the row that pieces were cut from."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        origin, cut, _ = row.id.rpartition("#")
        for key in [("asks", same_question(row)), *([("of", origin)] if cut else [])]:
            one, other = sorted((root(first.setdefault(key, i)), root(i)))
            parent[other] = one
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
