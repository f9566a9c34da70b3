"""What training will take: foretold from the model's shape, then measured before the first step counts."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from statistics import fmean
from typing import Any

import torch

from tunesmith.errors import MachineError
from tunesmith.models import machine as machines
from tunesmith.models.machine import Machine
from tunesmith.models.packs import common_beginning, tokens
from tunesmith.models.plan import Job, Plan, Shape, advise, empty_model, free_memory, peak_memory, shape_of, told
from tunesmith.models.quantise import FORMATS
from tunesmith.train.batching import Schedule
from tunesmith.train.layers import reached
from tunesmith.train.objectives.method import Example
from tunesmith.train.optimizers.make import grouped
from tunesmith.train.section import TrainSection

VALIDATED = 16  # validation rows that are tried
TURNS = 8  # steps at which is looked what is trained, where that changes


def job_of(
    section: TrainSection,
    shape: Shape,
    model: torch.nn.Module,
    weights: dict[str, torch.nn.Parameter],
    precision: str,
    device: str,
    examples: Sequence[Example],
    schedule: Schedule,
) -> Job:
    """What the section makes of examples and a model whose `weights` are trained, as far as its cost depends on it."""
    own = section.adapter.whole_model
    trained, epochs = sum(p.numel() for p in weights.values()), schedule.total / schedule.steps_per_epoch
    names, turns = [name for name, _ in model.named_parameters()], _turns(section, list(weights), schedule)
    sizes = [sum(weights[name].numel() for name in turn) for turn in turns]
    layers = [reached(names, turn) for turn in turns]
    read = [(e.beside, epochs) for e in examples]
    if section.method.compares:
        read += [(e.sequences + e.beside, 1.0) for e in examples]
    along = section.method.reads_along()
    state = section.optimizer.state_bytes(grouped(section, weights, section.adapter.rate_of))
    return Job(
        shape=shape,
        precision=precision,
        trained=trained,
        added=0 if own else trained,
        lengths=[tokens(common_beginning(e.sequences), e.sequences) for e in examples],
        shared=common_beginning([sequence for e in examples for sequence in e.sequences]),
        loss_tokens=sum(sequence.trained for e in examples for sequence in e.sequences),
        steps=schedule.total,
        epochs=epochs,
        batch_size=section.batch_size,
        pack_tokens=section.pack_tokens,
        state_bytes=state / max(trained, 1),
        kept_bytes=4.0 * sum(term.copies for term in section.keep),
        activations=section.speed.activations,
        reached=max(layers),
        at_once=max(sizes),
        usual=(fmean(sizes), fmean(layers)),
        quantise=section.quantise,
        replayed=sum(term.rows_seen(schedule.total) for term in section.keep),
        read=round(sum(tokens(common_beginning(rows), rows) * times for rows, times in read)),
        read_loss=round(sum(row.trained * times for rows, times in read for row in rows)),
        teacher=shape_of(empty_model(along[0])) if along else None,
        teacher_precision=along[1] if along else precision,
        device=device,
        format=_format(section) if shape.quantisable else None,
        eight_bit=section.optimizer.kind == "adamw" and find_spec("bitsandbytes") is not None,
    )


def _turns(section: TrainSection, names: list[str], schedule: Schedule) -> list[set[str]]:
    """Which of the weights are trained at some steps, spread evenly over the training up to its last."""
    if not hasattr(section.adapter, "trained_at"):
        return [set(names)]
    steps = {max(round(share * schedule.total / TURNS) - 1, 0) for share in range(1, TURNS + 1)}
    return [section.adapter.trained_at(step, names, schedule.seed) for step in sorted(steps)]


def _format(section: TrainSection) -> str | None:
    """The smallest format that a frozen base could lie in, under this adapter, or LoRA where none is frozen."""
    for name, format in sorted(FORMATS.items(), key=lambda item: item[1].bits):
        refused = None if section.adapter.whole_model else section.adapter.refuses(name)
        if find_spec(format.library) and not refused:
            return name
    return None


@dataclass(frozen=True)
class Measured:
    """What was measured before the first step, and what the run will take by it.

    Attributes:
        step_seconds, step_tokens: a step of usual size.
        longest_tokens: of the step that has most.
        validation_seconds, checkpoint_seconds: one of each.
        peak_bytes: most memory in use while all of that was done.
        seconds: the whole training, validations and checkpoints included; sample answers are not.
    """

    step_seconds: float
    step_tokens: int
    longest_tokens: int
    validation_seconds: float
    checkpoint_seconds: float
    peak_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def correct(self, plan: Plan) -> str:
        """What the measured figures say, beside what was foretold."""
        return (
            f"Measured before the first step: {self.peak_bytes / 2**30:.2f} GiB at the peak (planned "
            f"{plan.peak_bytes / 2**30:.2f}), {_span(self.seconds)} in all (planned {_span(plan.seconds)})"
        )


def calibrate(
    section: TrainSection,
    schedule: Schedule,
    lengths: Sequence[int],
    machine: Machine,
    step: Callable[[list[int]], object],
    held_out: Sequence[int],
    validate: Callable[[list[int]], object],
    checkpoint: Callable[[], object],
) -> Measured:
    """Take the longest step, one of usual size, a validation and a checkpoint, so that whatever runs out of memory
    or disk does so now. The caller puts weights, optimizer and random state back as they were.

    Args:
        lengths, held_out: tokens of the training and of the validation rows.
        step: takes an optimizer step on training rows by index.
        validate: takes the loss of validation rows by index.
        checkpoint: writes one.
    """
    first_epoch = [schedule.step(n) for n in range(min(schedule.steps_per_epoch, schedule.total))]
    by_tokens = sorted(first_epoch, key=lambda rows: sum(lengths[i] for i in rows))
    usual, longest = by_tokens[len(by_tokens) // 2], by_tokens[-1]
    with_longest_row = max(first_epoch, key=lambda rows: max(lengths[i] for i in rows))
    machines.forget_peak(machine.device)
    checkpoint_seconds = _timed(checkpoint)
    for rows in [longest] if longest is with_longest_row else [longest, with_longest_row]:
        step(rows)
    step_seconds = _timed(lambda: step(usual))
    validation_seconds = 0.0
    if held_out:  # the longest rows, and the whole by their tokens
        some = sorted(range(len(held_out)), key=lambda i: -held_out[i])[:VALIDATED]
        share = sum(held_out[i] for i in some) / sum(held_out)
        validation_seconds = _timed(lambda: validate(some)) / share
    size = sum(lengths[i] for i in usual)
    every = [sum(lengths[i] for i in rows) for rows in first_epoch]
    validations = math.ceil(schedule.total / (section.validate_every or schedule.steps_per_epoch))
    return Measured(
        step_seconds=round(step_seconds, 3),
        step_tokens=size,
        longest_tokens=sum(lengths[i] for i in longest),
        validation_seconds=round(validation_seconds, 3),
        checkpoint_seconds=round(checkpoint_seconds, 3),
        peak_bytes=machines.peak_memory(machine.device),
        seconds=round(
            step_seconds / size * sum(every) / len(every) * schedule.total
            + validation_seconds * validations
            + checkpoint_seconds * math.ceil(schedule.total / section.checkpoint_every),
            1,
        ),
    )


@contextlib.contextmanager
def out_of_memory(job: Job, what: str) -> Iterator[None]:
    """Turn a failed allocation into an error that says what to change.

    Raises:
        MachineError: memory ran out in the block.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MachineError(
            f"memory ran out in {what} ({str(error).splitlines()[0][:200]})",
            where="train.pack_tokens",
            fix=told(advise(job, min(free_memory(job.device), round(0.8 * sum(peak_memory(job).values()))))),
        ) from error


def _timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
