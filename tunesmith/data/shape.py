"""The training rows of an epoch: sources by weight, classes in balance, tags in their shares.

Every draw follows from the seed. A row that is repeated is the same row under a name of its own (`id*2`), and
what is left out is counted like any other row that was removed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.marks import column
from tunesmith.data.section import BalanceSection, DataSection
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.data.ledger import Ledger

Rows = list[Conversation]


def shape(section: DataSection, rows: Rows, seed: int, ledger: Ledger) -> Rows:
    """An epoch's training rows.

    Raises:
        DataError: `mix` names a tag of which no training row is left.
    """
    rows = weighed(rows, seed, ledger)
    if section.balance is not None:
        rows = balanced(rows, section.balance, seed, ledger)
    return mixed(rows, section.mix, seed, ledger) if section.mix else rows


def weighed(rows: Rows, seed: int, ledger: Ledger) -> Rows:
    """Each source's rows as often as its weight says."""
    out: Rows = []
    for tag in _by(rows, lambda row: row.metadata.get("tag")).values():
        for weight, members in _by(tag, lambda row: row.metadata.get("weight", 1.0)).items():
            wanted = round(len(members) * float(str(weight)))
            out += members if weight == 1 else _drawn(members, wanted, seed, "weight", ledger)
    return out


def balanced(rows: Rows, section: BalanceSection, seed: int, ledger: Ledger) -> Rows:
    """Classes of about one size, or of one weight."""
    classes = _by(rows, lambda row: row.answer if section.by == "label" else str(column(row, section.by)))
    sizes = {name: len(members) for name, members in classes.items()}
    if section.how == "weight":
        # as scikit-learn's class_weight="balanced": rows / (classes * rows of the class)
        weights = {name: len(rows) / (len(sizes) * n) for name, n in sizes.items()}
        weights = {name: min(max(w, 1 / section.cap), section.cap) for name, w in weights.items()}
        return [_heavier(row, weights[name]) for name, members in classes.items() for row in members]
    wanted = {"repeat": max(sizes.values()), "drop": min(sizes.values()), "count": section.rows or 0}[section.how]
    out: Rows = []
    for name, members in classes.items():
        most = max(int(section.cap * sizes[name]), 1)
        out += _drawn(members, min(wanted, most), seed, "balance", ledger)
    return out


def mixed(rows: Rows, shares: dict[str, float], seed: int, ledger: Ledger) -> Rows:
    """Tags in their shares, exact to the row.

    The tag of the largest share keeps every row once and so sets the epoch's size; of the others as many rows as
    belong to that are drawn, each once before any comes twice.
    """
    tags = _by(rows, lambda row: row.metadata.get("tag"))
    absent = next((tag for tag in shares if not tags.get(tag)), None)
    if absent is not None:
        raise DataError(
            f"no training row is left of tag '{absent}'",
            where=f"data.mix.{absent}",
            fix="Check that source, or leave it out.",
        )
    main = max(shares, key=lambda tag: shares[tag])
    out: Rows = []
    for tag, share in shares.items():
        wanted = round(len(tags[main]) * share / shares[main])
        out += _drawn(tags[tag], wanted, seed, "mix", ledger)
    return out


def _by(rows: Rows, key: Callable[[Conversation], Hashable]) -> dict[Hashable, Rows]:
    groups: dict[Hashable, Rows] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def _drawn(rows: Sequence[Conversation], wanted: int, seed: int, step: str, ledger: Ledger) -> Rows:
    """`wanted` of the rows: all of them as many times as goes, and a random part of them once more."""
    times, rest = divmod(wanted, len(rows))
    chosen = set(np.random.default_rng([seed, len(rows), wanted]).permutation(len(rows))[:rest].tolist())
    out: Rows = []
    for i, row in enumerate(rows):
        n = times + (i in chosen)
        if n == 0:
            ledger.remove(row, row.id, step, f"not drawn: {wanted} of {len(rows)} rows are wanted (data.{step})")
        out += [row if k == 1 else replace(row, id=f"{row.id}*{k}") for k in range(1, n + 1)]
        ledger.made += max(n - 1, 0)
    return out


def _heavier(row: Conversation, weight: float) -> Conversation:
    """The row with its answers' loss multiplied."""
    return replace(
        row,
        messages=tuple(replace(m, weight=m.weight * weight) if m.role == "assistant" else m for m in row.messages),
    )
