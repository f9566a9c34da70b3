"""Looking before leaping: what a recipe would train on, and what that would take. Nothing is kept."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.kit import Kit
from tunesmith.pipeline import open_recipe
from tunesmith.progress import say
from tunesmith.recipe import Recipe
from tunesmith.runs import Run, read_jsonl

SHOWN = 3


@dataclass(frozen=True)
class Check:
    """What `check` found.

    Attributes:
        counts: as in the data stage's manifest.
        answers: json, label or text.
        left_out: every row that was rejected or removed: row, reason, why.
        cut: every row that was shortened or cut into several to fit: row, why.
        error: why a run would stop over its rejected rows, as an error's `as_dict`; None if it would go on.
        shown: three conversations as [(token's text, its loss weight), ...].
    """

    counts: dict[str, Any]
    answers: str
    left_out: list[dict[str, str]]
    cut: list[dict[str, str]]
    error: dict[str, str | None] | None
    shown: list[list[tuple[str, float]]]

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


def check(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Check:
    """Validate a recipe and every row of its data without training.

    Raises:
        TunesmithError: what would have stopped the run.
    """
    from tunesmith.data.ledger import too_many_rejected
    from tunesmith.data.prepare import load_rows, prepare
    from tunesmith.models.plan import empty_model
    from tunesmith.models.quantise import refuse_large

    kit = _kit(recipe, overrides)
    empty = empty_model(kit.model)
    if kit.recipe.train.quantise:
        refuse_large(empty)
    kit.recipe.train.adapter.attach(empty)
    with tempfile.TemporaryDirectory() as folder:
        # Rows that can't be used are listed here, not a reason to stop before the others are seen.
        section = kit.recipe.data.model_copy(update={"max_rejected": 1.0})
        told = prepare(section, kit.data_inputs(), Path(folder))
        rows = load_rows(Path(folder) / "train.jsonl")
        rejected = read_jsonl(Path(folder) / "rejected.jsonl")
        left_out = [{"row": r["row"], "reason": r["reason"], "why": r["why"]} for r in rejected]
        left_out += [
            {"row": r["row"], "reason": r["step"], "why": r["why"]} for r in read_jsonl(Path(folder) / "removed.jsonl")
        ]
        cut = read_jsonl(Path(folder) / "cut.jsonl")
    error = too_many_rejected(kit.recipe.data.max_rejected, told["counts"]["read"], rejected)
    from tunesmith.train.encode import encode

    renderer, shown = kit.renderer, []
    from tunesmith.train import auto

    train, _ = auto.with_length(kit.recipe.train, kit.model)
    for example in encode(train, rows[:SHOWN], renderer)[:SHOWN]:
        for sequence in example.sequences:
            texts = [renderer.tokenizer.decode([i]) for i in sequence.ids]
            shown.append(list(zip(texts, sequence.weights, strict=True)))
    return Check(told["counts"], told["answers"]["kind"], left_out, cut, error.as_dict() if error else None, shown)


def plan(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Any:
    """Parameters, steps, tokens, expected peak memory and time of a recipe's training: a models.plan.Plan.

    Raises:
        TunesmithError: what would have stopped the run before training.
    """
    return resolved(recipe, overrides).plan


@dataclass(frozen=True)
class Resolved:
    """A plan, the `train` section with a number for every `auto`, and the data stage's counts."""

    plan: Any
    train: Any
    counts: dict[str, Any]


def resolved(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Resolved:
    """As `plan`, with what it was made of."""
    from tunesmith.data.prepare import load_rows, prepare
    from tunesmith.models.plan import empty_model, estimate, shape_of
    from tunesmith.models.quantise import refuse_large
    from tunesmith.train import auto
    from tunesmith.train.batching import Schedule
    from tunesmith.train.calibrate import job_of

    kit = _kit(recipe, overrides)
    train = kit.recipe.train
    with tempfile.TemporaryDirectory() as folder:
        counts = prepare(kit.recipe.data, kit.data_inputs(), Path(folder))["counts"]
        rows = load_rows(Path(folder) / "train.jsonl")
    from tunesmith.train.encode import encode

    train, choices = auto.with_length(auto.with_pack(train, kit.machine), kit.model)
    examples = encode(train, rows, kit.renderer)
    empty = empty_model(kit.model)
    if auto.wanted(train):
        train, more = auto.resolve(train, examples, empty)
        choices |= more
    if choices:
        say(auto.told(choices))
    schedule = Schedule.of(len(examples), train.batch_size, train.epochs, train.max_steps, kit.recipe.seed)
    shape = shape_of(empty)
    if train.quantise:
        refuse_large(empty)
    train.optimizer.check(kit.machine.device)
    model = train.adapter.attach(empty)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    machine = kit.machine
    precision = machine.precision if train.precision == "auto" else train.precision
    job = job_of(train, shape, model, weights, precision, machine.device, examples, schedule)
    return Resolved(estimate(job, machine), train, counts)


def _kit(recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str]) -> Kit:
    resolved, folder, _ = open_recipe(recipe, overrides)
    return Kit(resolved, folder, Run(Path(tempfile.gettempdir()) / "tunesmith-preview"))
