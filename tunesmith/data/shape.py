"""The training rows of an epoch: sources by weight, classes in balance, tags in their shares.

Every draw follows from the seed. A row that is repeated is the same row under a name of its own (`id*2`), and
what is left out is counted like any other row that was removed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.marks import column
from tunesmith.data.section import BalanceSection, DataSection
from tunesmith.data.shelf import Rows, grouped, joined
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.data.ledger import Ledger


def shape(section: DataSection, rows: Rows, seed: int, ledger: Ledger) -> Rows:
    """An epoch's training rows.

    Raises:
        DataError: `mix` names a tag of which no training row is left.
    """
    if any(source.tag is not None or source.weight != 1 for source in section.sources):
        rows = weighed(rows, seed, ledger)
    if section.balance is not None:
        rows = balanced(rows, section.balance, seed, ledger)
    return mixed(rows, section.mix, seed, ledger) if section.mix else rows


def weighed(rows: Rows, seed: int, ledger: Ledger) -> Rows:
    """Each source's rows as often as its weight says; tags one after the other, and weights within them."""
    out = []
    sources = grouped(rows, lambda row: (row.metadata.get("tag"), row.metadata.get("weight", 1.0)))
    tags = list(dict.fromkeys(tag for tag, _ in sources))
    for (_, weight), members in sorted(sources.items(), key=lambda source: tags.index(source[0][0])):
        some = rows[members]
        wanted = round(len(some) * float(str(weight)))
        out.append(some if weight == 1 else _drawn(some, wanted, seed, "weight", ledger))
    return joined(out, rows.shelf)


def balanced(rows: Rows, section: BalanceSection, seed: int, ledger: Ledger) -> Rows:
    """Classes of about one size, or of one weight."""
    classes = grouped(rows, lambda row: row.answer if section.by == "label" else str(column(row, section.by)))
    sizes = {name: len(members) for name, members in classes.items()}
    if section.how == "weight":
        # as scikit-learn's class_weight="balanced": rows / (classes * rows of the class)
        weights = {name: len(rows) / (len(sizes) * n) for name, n in sizes.items()}
        weights = {name: min(max(w, 1 / section.cap), section.cap) for name, w in weights.items()}
        return rows.shelf.put(_heavier(row, weights[name]) for name, of in classes.items() for row in rows[of])
    wanted = {"repeat": max(sizes.values()), "drop": min(sizes.values()), "count": section.rows or 0}[section.how]
    out = []
    for name, members in classes.items():
        most = max(int(section.cap * sizes[name]), 1)
        out.append(_drawn(rows[members], min(wanted, most), seed, "balance", ledger))
    return joined(out, rows.shelf)


def mixed(rows: Rows, shares: dict[str, float], seed: int, ledger: Ledger) -> Rows:
    """Tags in their shares, exact to the row.

    The tag of the largest share keeps every row once and so sets the epoch's size; of the others as many rows as
    belong to that are drawn, each once before any comes twice.
    """
    tags = grouped(rows, lambda row: row.metadata.get("tag"))
    absent = next((tag for tag in shares if tag not in tags), None)
    if absent is not None:
        raise DataError(
            f"no training row is left of tag '{absent}'",
            where=f"data.mix.{absent}",
            fix="Check that source, or leave it out.",
        )
    main = max(shares, key=lambda tag: shares[tag])
    out = []
    for tag, share in shares.items():
        wanted = round(len(tags[main]) * share / shares[main])
        out.append(_drawn(rows[tags[tag]], wanted, seed, "mix", ledger))
    return joined(out, rows.shelf)


def mixture(rows: Rows) -> dict[str, dict[str, float]]:
    """By tag: an epoch's rows, their share of all, and how many of them differ (the others are repeats)."""
    found: dict[str, dict[str, float]] = {}
    for tag, members in grouped(rows, lambda row: row.metadata.get("tag")).items():
        different = {row.id.partition("*")[0] for row in rows[members]}
        found[str(tag)] = {"rows": len(members), "share": len(members) / len(rows), "different": len(different)}
    return found


def _drawn(rows: Rows, wanted: int, seed: int, step: str, ledger: Ledger) -> Rows:
    """`wanted` of the rows: all of them as many times as goes, and a random part of them once more."""
    times, rest = divmod(wanted, len(rows))
    how_often = np.full(len(rows), times)
    how_often[np.random.default_rng([seed, len(rows), wanted]).permutation(len(rows))[:rest]] += 1
    for row in rows[how_often == 0]:
        ledger.remove(row, row.id, step, f"not drawn: {wanted} of {len(rows)} rows are wanted (data.{step})")
    places = np.repeat(rows.places, how_often)
    again = np.arange(len(places)) - np.repeat(np.cumsum(how_often) - how_often, how_often)
    repeated = again > 0
    numbers = (again[repeated] + 1).tolist()
    more = Rows(rows.shelf, places[repeated])
    named = rows.shelf.put(replace(row, id=f"{row.id}*{k}") for row, k in zip(more, numbers, strict=True))
    places[repeated] = named.places
    if len(named):
        ledger.made[step] += len(named)
    return Rows(rows.shelf, places)


def _heavier(row: Conversation, weight: float) -> Conversation:
    """The row with its answers' loss multiplied."""
    return replace(
        row,
        messages=tuple(replace(m, weight=m.weight * weight) if m.role == "assistant" else m for m in row.messages),
    )
