"""Rows laid end to end: which go together, and where each lies.

What all rows of a pack begin with (a system prompt, as a rule), or the rows that belong together (the prompt of two
answers), is there once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.conversation.render import Rendered
from tunesmith.models.attention import Family, Layout
from tunesmith.models.shapes import rounded

SHARED_AT_LEAST = 8  # a shorter common beginning is not worth a mask


@dataclass(frozen=True)
class Pack:
    """Rows laid end to end, after the beginning that they share.

    Attributes:
        ids_T: token ids.
        positions_T: each token's place in its row.
        layout: where the rows lie.
        places_N: the tokens that carry weight.
        before_N: for each of them, the token that predicts it.
        weights_N: their losses' weights.
        owner_N: which row each belongs to, counted within the pack.
    """

    ids_T: Tensor
    positions_T: Tensor
    layout: Layout
    places_N: Tensor
    before_N: Tensor
    weights_N: Tensor
    owner_N: Tensor


def common_beginning(rows: Sequence[Rendered]) -> int:
    """How many tokens all rows begin with and none learns (a system prompt, as a rule), or 0 where so few
    are not worth it. At least one token of each row is left."""
    if len(rows) < 2:
        return 0
    first, *others = rows
    limit = min(len(r) for r in rows) - 1
    shared = 0
    while shared < limit and not any(r.weights[shared] for r in rows):
        if any(r.ids[shared] != first.ids[shared] for r in others):
            break
        shared += 1
    return shared if shared >= SHARED_AT_LEAST else 0


def families(rows: Sequence[Rendered], sizes: Sequence[int] | None = None) -> list[tuple[int, list[Rendered]]]:
    """Rows in families that share their beginning: all of them in one, or those that belong together in one each,
    whichever leaves fewer tokens to compute.

    Args:
        sizes: how many consecutive rows belong together; each alone if None.
    """
    together = [(common_beginning(rows), list(rows))]
    if not sizes or max(sizes) == 1:
        return together
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    groups = [list(rows[start : start + size]) for start, size in zip(starts, sizes, strict=True)]
    apart = [(common_beginning(group), group) for group in groups]
    return min(together, apart, key=lambda found: sum(tokens(shared, group) for shared, group in found))


def tokens(shared: int, rows: Sequence[Rendered]) -> int:
    """How many tokens rows take whose first `shared` are there once."""
    return shared + sum(len(row) - shared for row in rows)


def pack(
    rows: Sequence[Rendered],
    device: str | torch.device = "cpu",
    share: bool = True,
    sizes: Sequence[int] | None = None,
    few: bool = False,
) -> Pack:
    """Lay rows end to end; what a family of them (`families`) begins with is there, and computed, once.

    Args:
        few: whether the sequence and its groups are filled up to sizes that come again (`shapes.py`).
    """
    ids: list[int] = []
    positions: list[int] = []
    places, before, weights, owner = [], [], [], []
    found = families(rows, sizes) if share else [(0, list(rows))]
    number = 0
    for shared, members in found:
        at = len(ids)
        ids += members[0].ids[:shared]
        positions += range(shared)
        for row in members:
            start = len(ids) - shared
            for i in range(max(shared, 1), len(row)):
                if row.weights[i]:
                    places.append(start + i)
                    before.append(start + i - 1 if i > shared else at + shared - 1)
                    weights.append(row.weights[i])
                    owner.append(number)
            ids += row.ids[shared:]
            positions += range(shared, len(row))
            number += 1
    padding = rounded(len(ids)) - len(ids) if few else 0
    ids += ids[:1] * padding
    positions += range(padding)
    family = [Family(shared, [len(r) - shared for r in members]) for shared, members in found]
    return Pack(
        torch.tensor(ids, device=device),
        torch.tensor(positions, device=device),
        Layout(family, device, padding, few),
        torch.tensor(places, dtype=torch.long, device=device),
        torch.tensor(before, dtype=torch.long, device=device),
        torch.tensor(weights, dtype=torch.float32, device=device),
        torch.tensor(owner, dtype=torch.long, device=device),
    )


def by_prompt(rows: Sequence[Rendered], capacity: float) -> list[list[int]]:
    """Indices of rows that go on from the same tokens, none of which carries weight: several answers to one prompt, as
    many as fit `capacity`. A row without such a beginning is alone."""
    groups: list[list[int]] = []
    last: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        prompt = tuple(row.ids[: next((at for at, weight in enumerate(row.weights) if weight), len(row) - 1)])
        group = last.get(prompt, [])
        fits = tokens(len(prompt), [rows[j] for j in group] + [row]) <= capacity
        if group and fits and len(prompt) >= SHARED_AT_LEAST:
            group.append(i)
        else:
            last[prompt] = [i]
            groups.append(last[prompt])
    return groups


def packs(indices: Sequence[int], rows: Sequence[Sequence[Rendered]], capacity: int) -> list[list[int]]:
    """Some sets of rows that belong together, by index, grouped so that each group's tokens fit `capacity`."""
    chosen = [rows[i] for i in indices]
    every = [row for together in chosen for row in together]
    shared = common_beginning(every)
    apart = [tokens(common_beginning(together), together) for together in chosen]
    if max(map(len, chosen)) == 1 or tokens(shared, every) <= sum(apart):
        groups = best_fit(
            [sum(len(row) - shared for row in together) for together in chosen], max(capacity - shared, 1)
        )
    else:
        groups = best_fit(apart, capacity)
    return [[indices[j] for j in group] for group in groups]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of rows, grouped so that each group's tokens fit `capacity` (longest first, tightest bin).

    A row longer than `capacity` gets a group of its own.
    """
    bins: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [(room, b) for b, (room, _) in enumerate(bins) if room >= lengths[i]]
        if fitting:
            room, b = min(fitting)
            bins[b][1].append(i)
            bins[b] = (room - lengths[i], bins[b][1])
        else:
            bins.append((capacity - lengths[i], [i]))
    return [sorted(members) for _, members in bins]
