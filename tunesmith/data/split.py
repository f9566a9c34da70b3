"""Training, validation and test rows: by seed or by time, stratified, and never one question, group or
near-duplicate on two sides."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.alike import pairs_alike
from tunesmith.data.groups import DIGEST, Groups, digest, same
from tunesmith.data.marks import column
from tunesmith.data.section import SplitSection
from tunesmith.data.shelf import Rows

if TYPE_CHECKING:
    from tunesmith.data.ledger import Ledger

Parts = dict[str, Rows]
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
        rows = parts["train"]
        if section.time is not None:
            taken = newest(rows, wanted, section.time)
        else:
            taken = drawn(rows, wanted, seed, _stratum(section, by_label), section.by, alike)
        parts["train"], parts[part] = rows[~taken], rows[taken]
    return parts if section.time is None else _without_clashes(parts, section.by, ledger)


def _stratum(section: SplitSection, by_label: bool) -> Callable[[Conversation], Hashable] | None:
    if section.stratify == "none" or (section.stratify == "auto" and not by_label):
        return None
    if section.stratify in ("auto", "label"):
        return lambda row: row.answer
    return lambda row: str(column(row, section.stratify))


def _without_clashes(parts: Parts, by: str | None, ledger: Ledger) -> Parts:
    """What test has, validation has not, and what either has, training has not."""
    held = {part: {key for row in parts[part] for key in _keys(row, by)} for part in ("validation", "test")}
    for part, others in (("validation", ("test",)), ("train", ("test", "validation"))):
        if not any(held[other] for other in others):
            continue
        kept = np.ones(len(parts[part]), dtype=bool)
        for i, row in enumerate(parts[part]):
            keys = _keys(row, by)
            clash = next((o for o in others if any(key in held[o] for key in keys)), None)
            if clash is None:
                continue
            kept[i] = False
            if keys[0] in held[clash]:
                ledger.remove(row, row.id, f"in_{clash}", f"asks the same as a {clash} row")
            else:
                ledger.remove(row, row.id, f"in_{clash}", f"has the same {by} as a {clash} row")
        parts[part] = parts[part][kept]
    return parts


def _keys(row: Conversation, by: str | None) -> list[bytes]:
    """What no two sides may share of a row, hashed: the question, and the group where there is one."""
    value = column(row, by) if by is not None else None
    return [digest(f"asks {same_question(row)}"), *([digest(f"by {value}")] if value is not None else [])]


def newest(rows: Sequence[Conversation], wanted: int, time: str) -> np.ndarray:
    """Whether each row is one of the `wanted` newest by a column of times."""
    times = np.fromiter((column(row, time) for row in rows), dtype=np.float64, count=len(rows))
    taken = np.zeros(len(rows), dtype=bool)
    taken[np.argsort(times, kind="stable")[max(len(rows) - wanted, 0) :]] = True
    return taken


def drawn(
    rows: Sequence[Conversation],
    wanted: int,
    seed: int,
    stratum: Callable[[Conversation], Hashable] | None = None,
    by: str | None = None,
    alike: Alike | None = None,
) -> np.ndarray:
    """Whether each row is one of `wanted` rows that are drawn to be held out.

    Rows that ask the same question go together, and so do those of a group (`by`), near-duplicates, and the
    pieces of a row that was too long. Each stratum's groups are spread evenly over the order in which groups are
    drawn (systematic sampling), so that every stratum gives its share.
    """
    leaders, strata = _together(rows, by, alike, stratum)
    first, group = np.unique(leaders, return_inverse=True)  # groups in the order of their first rows
    sizes = np.bincount(group, minlength=len(first))
    random = np.random.default_rng([seed, len(rows)])
    ranks, ties, groups = [np.empty((0,))], [np.empty((0,))], [np.empty(0, dtype=np.int64)]
    for members in _in_order(strata[first]):
        order = random.permutation(len(members))
        two = random.random(2 * len(members))
        ranks.append((np.arange(len(members)) + two[0::2]) / len(members))
        ties.append(two[1::2])
        groups.append(members[order])
    of = np.concatenate(groups)[np.lexsort((np.concatenate(ties), np.concatenate(ranks)))]
    taken, count = np.zeros(len(first), dtype=bool), 0
    for one, size in zip(of.tolist(), sizes[of].tolist(), strict=True):
        if count + size <= wanted:
            taken[one] = True
            count += size
            if count == wanted:
                break
    return taken[group] if len(rows) else np.zeros(0, dtype=bool)


def _in_order(strata: np.ndarray) -> list[np.ndarray]:
    """Indices of each stratum's groups; strata in the order in which they come."""
    order = np.argsort(strata, kind="stable")
    cuts = np.flatnonzero(np.diff(strata[order])) + 1
    return sorted((part for part in np.split(order, cuts) if len(part)), key=lambda part: int(part[0]))


def _together(
    rows: Sequence[Conversation],
    by: str | None,
    alike: Alike | None,
    stratum: Callable[[Conversation], Hashable] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first of those that must not be split from it, and the number of its stratum."""
    known: dict[Hashable, int] = {}
    strata = np.zeros(len(rows), dtype=np.int32)
    keys, where = bytearray(), array("q")
    for i, row in enumerate(rows):
        origin, cut, _ = row.id.rpartition("#")
        for key in [*_keys(row, by), *([digest(f"of {origin}")] if cut else [])]:
            keys += key
            where.append(i)
        if stratum is not None:
            strata[i] = known.setdefault(stratum(row), len(known))
    groups = Groups(len(rows))
    places = np.array(where, dtype=np.int64)
    leaders = places[same(np.frombuffer(keys, dtype=DIGEST))] if len(places) else places
    for i in np.flatnonzero(leaders != places).tolist():
        groups.join(int(leaders[i]), int(places[i]))
    for group in alike(rows) if alike is not None else ():
        for i in group:
            groups.join(group[0], i)
    return groups.leaders(), strata
