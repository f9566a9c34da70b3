"""Training, validation and test rows: by seed or by time, stratified, and never one question, group or
near-duplicate on two sides."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.alike import Alike, alike
from tunesmith.data.clean.step import Around
from tunesmith.data.groups import DIGEST, Groups, digest, same
from tunesmith.data.marks import column
from tunesmith.data.section import SplitSection
from tunesmith.data.shelf import Rows, joined

if TYPE_CHECKING:
    from tunesmith.data.ledger import Ledger

Parts = dict[str, Rows]
NONE_ALIKE = Alike(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))


def same_question(row: Conversation) -> str:
    """What makes two rows ask the same: the users' text, whatever its case and spacing."""
    return " ".join(row.question.casefold().split())


def split(
    section: SplitSection, parts: Parts, by_label: bool, ledger: Ledger, around: Around
) -> tuple[Parts, dict[str, Any]]:
    """Hold out what the recipe asks for. Rows that would let training see a held-out row are removed, and told.

    Args:
        parts: `train` holds everything that is to be split; the others what files of their own gave.
        by_label: whether the answers are labels; they are then given their share, unless the section says otherwise.

    Returns:
        The parts; and what to tell of them: rows that are alike, and parts that came out smaller than was asked for.
    """
    like, told = _alike(section, parts, around)
    parts = _without_clashes(dict(parts), section.by, like, ledger)
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
            taken = drawn(rows, wanted, around.seed, _stratum(section, by_label), section.by, like.of(rows))
        parts["train"], parts[part] = rows[~taken], rows[taken]
        if len(parts[part]) < wanted:
            told.setdefault("short", {})[part] = {"asked for": wanted, "rows": len(parts[part])}
    return (parts if section.time is None else _without_clashes(parts, section.by, like, ledger)), told


def _alike(section: SplitSection, parts: Parts, around: Around) -> tuple[Alike, dict[str, Any]]:
    """Rows of all parts that are alike, and what to tell of them; none where nothing is held out."""
    rows = joined(parts.values(), parts["train"].shelf)
    if section.near is None or not (section.validation or section.test) or not len(rows):
        return NONE_ALIKE, {}
    like = alike(rows, section.near, around.engine, around.scratch)
    return like, {"near": {"rows": len(like.groups), "groups": len(np.unique(like.groups))}}


def _stratum(section: SplitSection, by_label: bool) -> Callable[[Conversation], Hashable] | None:
    if section.stratify == "none" or (section.stratify == "auto" and not by_label):
        return None
    if section.stratify in ("auto", "label"):
        return lambda row: row.answer
    return lambda row: str(column(row, section.stratify))


def _without_clashes(parts: Parts, by: str | None, like: Alike, ledger: Ledger) -> Parts:
    """What test has, validation has not, and what either has, training has not."""
    held = {
        part: {key for row, group in _grouped(parts[part], like) for key in _keys(row, by, group).values()}
        for part in ("validation", "test")
    }
    for part, others in (("validation", ("test",)), ("train", ("test", "validation"))):
        if not any(held[other] for other in others):
            continue
        kept = np.ones(len(parts[part]), dtype=bool)
        for i, (row, group) in enumerate(_grouped(parts[part], like)):
            keys = _keys(row, by, group)
            found = next(((o, how) for o in others for how, key in keys.items() if key in held[o]), None)
            if found is not None:
                kept[i] = False
                ledger.remove(row, row.id, f"in_{found[0]}", f"{found[1]} a {found[0]} row")
        parts[part] = parts[part][kept]
    return parts


def _grouped(rows: Rows, like: Alike) -> zip[tuple[Conversation, int]]:
    return zip(rows, like.of(rows).tolist(), strict=True)


def _keys(row: Conversation, by: str | None, group: int = -1) -> dict[str, bytes]:
    """What no two sides may share of a row, hashed, by how rows that share it go together: the question, the group
    where there is one, and that of rows that are alike."""
    keys = {"asks the same as": digest(f"asks {same_question(row)}")}
    value = column(row, by) if by is not None else None
    if value is not None:
        keys[f"has the same {by} as"] = digest(f"by {value}")
    if group >= 0:
        keys["asks nearly the same as"] = digest(f"like {group}")
    return keys


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
    like: np.ndarray | None = None,
) -> np.ndarray:
    """Whether each row is one of `wanted` rows that are drawn to be held out.

    Rows that ask the same question go together, and so do those of a group (`by`), those that are alike (`like`, the
    number of each row's group or -1), and the pieces of a row that was too long. Each stratum's groups are spread
    evenly over the order in which groups are drawn (systematic sampling), so that every stratum gives its share.
    """
    leaders, strata = _together(rows, by, like, stratum)
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
    like: np.ndarray | None,
    stratum: Callable[[Conversation], Hashable] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first of those that must not be split from it, and the number of its stratum."""
    known: dict[Hashable, int] = {}
    strata = np.zeros(len(rows), dtype=np.int32)
    keys, where = bytearray(), array("q")
    groups_of = [-1] * len(rows) if like is None else like.tolist()
    for i, (row, group) in enumerate(zip(rows, groups_of, strict=True)):
        origin, cut, _ = row.id.rpartition("#")
        for key in [*_keys(row, by, group).values(), *([digest(f"of {origin}")] if cut else [])]:
            keys += key
            where.append(i)
        if stratum is not None:
            strata[i] = known.setdefault(stratum(row), len(known))
    groups = Groups(len(rows))
    places = np.array(where, dtype=np.int64)
    leaders = places[same(np.frombuffer(keys, dtype=DIGEST))] if len(places) else places
    for i in np.flatnonzero(leaders != places).tolist():
        groups.join(int(leaders[i]), int(places[i]))
    return groups.leaders(), strata
