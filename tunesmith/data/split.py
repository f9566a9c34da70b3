"""Training, validation and test rows: by seed or by time, stratified, and never one question, group or
near-duplicate on two sides."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.alike import pairs_alike
from tunesmith.data.marks import column
from tunesmith.data.section import SplitSection

if TYPE_CHECKING:
    from tunesmith.data.ledger import Ledger

Parts = dict[str, list[Conversation]]
# Groups of rows that say nearly the same, as lists of their places.
Alike = Callable[[Sequence[Conversation]], Sequence[Sequence[int]]]


def same_question(row: Conversation) -> str:
    """What makes two rows ask the same: the users' text, whatever its case and spacing."""
    return " ".join(row.question.casefold().split())


def split(section: SplitSection, parts: Parts, seed: int, by_label: bool, ledger: Ledger) -> Parts:
    """Hold out what the recipe asks for. Rows that would let training see a held-out row are removed, and told.

    Args:
        parts: `train` holds everything that is to be split; the others what files of their own gave.
        by_label: whether the answers are labels; they are then given their share, unless the section says otherwise.
    """
    alike = partial(pairs_alike, threshold=section.near) if section.near is not None else None
    parts = _without_clashes(dict(parts), section.by, ledger)
    total = len(parts["train"])
    for part in ("test", "validation"):
        share = getattr(section, part)
        if isinstance(share, str):
            continue
        wanted = max(round(share * total), 1 if share else 0) if share < 1 else int(share)
        if section.time is not None:
            parts["train"], parts[part] = hold_newest(parts["train"], wanted, section.time)
        else:
            parts["train"], parts[part] = hold_out(
                parts["train"], wanted, seed, _stratum(section, by_label), section.by, alike
            )
    return parts if section.time is None else _without_clashes(parts, section.by, ledger)


def _stratum(section: SplitSection, by_label: bool) -> Callable[[Conversation], Hashable]:
    if section.stratify == "none" or (section.stratify == "auto" and not by_label):
        return lambda row: ""
    if section.stratify in ("auto", "label"):
        return lambda row: row.answer
    return lambda row: str(column(row, section.stratify))


def _without_clashes(parts: Parts, by: str | None, ledger: Ledger) -> Parts:
    """What test has, validation has not, and what either has, training has not."""
    held = {part: {key for row in parts[part] for key in _keys(row, by)} for part in ("validation", "test")}
    for part, others in (("validation", ("test",)), ("train", ("test", "validation"))):
        kept = []
        for row in parts[part]:
            keys = _keys(row, by)
            clash = next((o for o in others if any(key in held[o] for key in keys)), None)
            if clash is None:
                kept.append(row)
            elif keys[0] in held[clash]:
                ledger.remove(row, row.id, f"in_{clash}", f"asks the same as a {clash} row")
            else:
                ledger.remove(row, row.id, f"in_{clash}", f"has the same {by} as a {clash} row")
        parts[part] = kept
    return parts


def _keys(row: Conversation, by: str | None) -> list[tuple[str, str]]:
    """What no two sides may share of a row."""
    value = column(row, by) if by is not None else None
    return [("asks", same_question(row)), *([("by", str(value))] if value is not None else [])]


def hold_newest(rows: Sequence[Conversation], wanted: int, time: str) -> tuple[list[Conversation], list[Conversation]]:
    """Split off the `wanted` newest rows by a column of times: (the rest, the part), both in the rows' order."""
    order = sorted(range(len(rows)), key=lambda i: (column(rows[i], time), i))
    taken = set(order[max(len(rows) - wanted, 0) :])
    return [r for i, r in enumerate(rows) if i not in taken], [r for i, r in enumerate(rows) if i in taken]


def hold_out(
    rows: Sequence[Conversation],
    wanted: int,
    seed: int,
    stratum: Callable[[Conversation], Hashable],
    by: str | None = None,
    alike: Alike | None = None,
) -> tuple[list[Conversation], list[Conversation]]:
    """Split off `wanted` rows: (the rest, the part), both in the rows' order.

    Rows that ask the same question go together, and so do those of a group (`by`), near-duplicates, and the
    pieces of a row that was too long. Each stratum's groups are spread evenly over the order in which groups are
    drawn (systematic sampling), so that every stratum gives its share.
    """
    strata: dict[Hashable, list[list[int]]] = {}
    for members in _together(rows, by, alike):
        strata.setdefault(stratum(rows[members[0]]), []).append(members)

    random = np.random.default_rng([seed, len(rows)])
    drawn: list[tuple[float, float, list[int]]] = []
    for members_of_stratum in strata.values():
        for place, which in enumerate(random.permutation(len(members_of_stratum))):
            rank = (place + random.random()) / len(members_of_stratum)
            drawn.append((rank, random.random(), members_of_stratum[which]))
    taken: set[int] = set()
    for _, _, members in sorted(drawn, key=lambda d: d[:2]):
        if len(taken) + len(members) <= wanted:
            taken.update(members)
    return (
        [row for i, row in enumerate(rows) if i not in taken],
        [row for i, row in enumerate(rows) if i in taken],
    )


def _together(rows: Sequence[Conversation], by: str | None, alike: Alike | None) -> list[list[int]]:
    """Indices of rows in groups that must not be split."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    def join(i: int, j: int) -> None:
        one, other = sorted((root(i), root(j)))
        parent[other] = one

    first: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        origin, cut, _ = row.id.rpartition("#")
        for key in [*_keys(row, by), *([("of", origin)] if cut else [])]:
            join(first.setdefault(key, i), i)
    for group in alike(rows) if alike is not None else ():
        for i in group:
            join(group[0], i)
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())
