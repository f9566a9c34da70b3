"""One optimizer step, and a validation, over packs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tunesmith.progress import bar
from tunesmith.train.objectives.method import Batch, Example, Method
from tunesmith.train.parallel.alone import Alone, Turn
from tunesmith.train.ranks import Ranks
from tunesmith.train.section import TrainSection

Clock = Callable[[str], AbstractContextManager[Any]]  # counts what a block takes under a name


def no_clock(what: str) -> AbstractContextManager[Any]:
    return nullcontext()


def gradients(
    section: TrainSection,
    split: Alone,
    examples: Sequence[Example],
    known: Any,
    also: Callable[[], None],
    clock: Clock = no_clock,
) -> tuple[float, dict[str, float], float]:
    """Gradients of one optimizer step, clipped: its loss, figures beside it, and the norm before clipping.

    Args:
        also: adds other terms' gradients before they are clipped.
        clock: counts as `data` what laying out the rows takes.
    """
    total, told = 0.0, Means()
    sizes, batches = in_packs(section, split, examples, known, clock=clock)
    for batch, turn in batches:
        found = split(batch, turn.last)
        # Each pack adds its sum, divided by the whole step's size: neither packing nor ranks change anything.
        loss: torch.Tensor = sum(term / sizes[name] for name, term in found.terms.items())  # type: ignore[assignment]
        split.backward(loss if turn.counts else loss * 0)
        if turn.counts:
            total += loss.item()
            told.add(found.told)
    also()
    losses, figures = _added(split.ranks, {"loss": total}, told)
    return losses["loss"], figures, split.clip(section.clip)


def update(split: Alone, rate: float) -> None:
    for group in split.optimizer.param_groups:
        group["lr"] = rate * group["share"]
    split.update()


@torch.no_grad()
def validate(
    section: TrainSection, split: Alone, examples: Sequence[Example], known: Any, tasks: Mapping[str, str] | None = None
) -> tuple[float, dict[str, float]]:
    """The loss of the held-out rows as if they were one step, and the figures beside it.

    Args:
        tasks: the tags of rows, by their ids; then the loss of each tag's rows alone is among the figures (`loss_TAG`).
    """
    split.run.eval()
    losses, told = {"loss": 0.0}, Means()
    parts: dict[str, list[Example]] = {}
    for example in examples:
        parts.setdefault(f"loss_{tasks[example.row]}" if tasks and example.row in tasks else "", []).append(example)
    sizes = {name: _sizes(section.method, part) for name, part in parts.items()}
    whole, batches = in_packs(section, split, examples, known, list(parts.values()))
    names = {id(example): name for name, part in parts.items() for example in part}
    with bar("Validating", len(examples) / split.ranks.world) as progress:
        for batch, turn in batches:
            found = split(batch)
            if turn.counts:
                name = names[id(batch.examples[0])]
                terms = {term: value.item() for term, value in found.terms.items()}
                losses["loss"] += sum(value / whole[term] for term, value in terms.items())
                if name:
                    mine = sum(value / sizes[name][term] for term, value in terms.items())
                    losses[name] = losses.get(name, 0.0) + mine
                told.add(found.told)
            progress.advance(len(batch.examples))
    split.run.train()
    losses, figures = _added(split.ranks, losses, told)
    return losses.pop("loss"), figures | losses


def by_loss(section: TrainSection, split: Alone, examples: Sequence[Example], known: Any) -> list[str]:
    """The names of some examples' rows, those with the highest loss first (several ranks: as they come, since only
    the first rank asks)."""
    if split.ranks.world > 1:
        return list(dict.fromkeys(example.row for example in examples))
    with torch.random.fork_rng():
        losses = {example.row: validate(section, split, [example], known)[0] for example in examples}
    return sorted(losses, key=lambda name: -losses[name])


def in_packs(
    section: TrainSection,
    split: Alone,
    examples: Sequence[Example],
    known: Any,
    parts: Sequence[Sequence[Example]] = (),
    clock: Clock = no_clock,
) -> tuple[Counter[str], Iterator[tuple[Batch, Turn]]]:
    """The sizes that the terms of these examples' loss are divided by, and this rank's examples in packs. `parts`: the
    same examples in parts of which no pack holds two."""
    method: Method = section.method

    def packed(
        chosen: Sequence[Example], sequences: list[tuple[Any, ...]], shared: bool
    ) -> Iterator[tuple[list[Example], Any, Turn]]:
        with clock("data"):
            turns = split.turns(sequences, section.pack_tokens, shared)
        for turn in turns:
            rows, counts = [s for i in turn.group for s in sequences[i]], [len(sequences[i]) for i in turn.group]
            with clock("data"):
                pack = split.step.packed.pack(rows, counts)
            yield [chosen[i] for i in turn.group], pack, turn

    context = None
    if any(example.beside for example in examples):  # the whole step's, so every rank looks at all of them
        with torch.no_grad():
            looked = packed(examples, [example.beside for example in examples], shared=False)
            context = method.look(split, ((group, pack) for group, pack, _ in looked))  # type: ignore[arg-type]
    batches = (made for part in parts or [examples] for made in packed(part, [e.sequences for e in part], shared=True))
    return _sizes(method, examples), ((Batch(group, pack, known, context), turn) for group, pack, turn in batches)


def _sizes(method: Method, examples: Sequence[Example]) -> Counter[str]:
    """What each term of these examples' loss is divided by."""
    sizes: Counter[str] = Counter()
    for example in examples:
        sizes.update(method.sizes(example))
    return sizes


def _added(ranks: Ranks, losses: dict[str, float], told: Means) -> tuple[dict[str, float], dict[str, float]]:
    """The ranks' losses added up, by name, and the means of their figures."""
    if ranks.world == 1:
        return losses, told.values
    found, means = ranks.all((losses, told.sums)), Means()
    for _, sums in found:
        means.add(sums)
    names = sorted({name for mine, _ in found for name in mine})
    return {name: math.fsum(mine.get(name, 0.0) for mine, _ in found) for name in names}, means.values


class Means:
    """Means of figures that come as sums and counts."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}

    def add(self, told: dict[str, tuple[float, float]]) -> None:
        for name, (total, count) in told.items():
            before = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = before[0] + total, before[1] + count

    @property
    def values(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items() if count}
