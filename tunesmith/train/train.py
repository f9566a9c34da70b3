"""The training loop."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.errors import DataError, Interrupted, MachineError, TrainingError
from tunesmith.models.load import load_model
from tunesmith.models.machine import Machine, reuse_buffers
from tunesmith.models.packed import PackedForward, packs
from tunesmith.models.resolve import ResolvedModel
from tunesmith.progress import bar, say
from tunesmith.runs import Run, append_jsonl, json_line, need_room, read_jsonl, whole_folder, write_text
from tunesmith.train import checkpoints, optimizers
from tunesmith.train.batching import Schedule, learning_rate
from tunesmith.train.checkpoints import State
from tunesmith.train.section import TrainSection


@dataclass(frozen=True)
class TrainInputs:
    """What the loop works on."""

    training: Sequence[Conversation]
    validation: Sequence[Conversation]
    model: ResolvedModel
    renderer: Renderer
    machine: Machine
    seed: int


def train(section: TrainSection, inputs: TrainInputs, run: Run) -> dict[str, Any]:
    """Train into `run.tuned`, going on from the newest checkpoint if there is one.

    Returns what the manifest tells of it: steps, tokens, best step, precision, which forward was used.

    Raises:
        TrainingError: the loss or the gradient is not finite; names the rows of that step.
        Interrupted: on Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    rows = encode(section, inputs.training, inputs.renderer)
    held_out = encode(section, inputs.validation, inputs.renderer) if inputs.validation else []
    lengths = [len(r) for r in rows]
    schedule = Schedule.of(len(rows), section.batch_size, section.epochs, section.max_steps, inputs.seed)
    validate_every = section.validate_every or schedule.steps_per_epoch
    state = checkpoints.newest(run.checkpoints) or State(
        precision=inputs.machine.precision if section.precision == "auto" else section.precision,
        threads=torch.get_num_threads(),
    )
    if state.threads != torch.get_num_threads():
        say(f"going on with {torch.get_num_threads()} threads after {state.threads}: last digits may differ")

    if section.adapter.whole_model:  # its own weights are the masters
        state.precision = "float32"
    model, forward, parameters = _load(section, inputs, state.precision, rows)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained = sum(p.numel() for p in weights.values())
    saved = parameters if section.adapter.whole_model else trained
    need_room(run.path, 4 * (3 * trained * (section.keep_checkpoints + 1) + 2 * saved), "Training")
    optimizer = optimizers.make(section, weights, section.adapter.rate_of)
    if state.step:
        checkpoints.restore(run.checkpoints, state, weights, optimizer)
        say(f"Going on from step {state.step} of {schedule.total}")
    _forget_after(run, state.step)
    run.event("train_started", step=state.step, total=schedule.total, forward=forward.why)

    model.train()
    with _stop_requests() as stop, bar("Training", schedule.total, state.step) as progress:
        while state.step < schedule.total and not _stale(section, state):
            chosen = schedule.step(state.step)
            rate = learning_rate(
                state.step, schedule.total, section.learning_rate, section.warmup, section.schedule, section.decay
            )
            began = time.perf_counter()
            loss, norm = _gradients(section, forward, rows, packs(chosen, rows, section.pack_tokens))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                checkpoints.save(run.checkpoints, state, weights, optimizer, section.keep_checkpoints)
                raise _not_finite({"loss": loss, "gradient's norm": norm}, state, inputs.training, chosen, run)
            _update(optimizer, rate)
            if not torch.stack(torch._foreach_norm(list(weights.values()))).isfinite().all():
                raise _not_finite({"weights": math.nan}, state, inputs.training, chosen, run)
            tokens, seconds = sum(lengths[i] for i in chosen), time.perf_counter() - began
            state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, state.seconds + seconds
            line: dict[str, Any] = {
                "step": state.step,
                "epoch": round(state.step / schedule.steps_per_epoch, 4),
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": tokens,
                "tokens_per_second": round(tokens / seconds, 1),
                "memory_bytes": _memory(inputs.machine.device),
            }
            last = state.step == schedule.total
            if held_out and (state.step % validate_every == 0 or last):
                line["validation_loss"] = found = _validate(section, forward, held_out)
                if not math.isfinite(found):
                    raise _not_finite({"validation loss": found}, state, inputs.validation, range(5), run)
                if _improved(state, found) and section.keep_best:
                    with whole_folder(run.stage("train") / "best") as folder:
                        section.adapter.save(model, folder)
            append_jsonl(run.metrics, line)
            progress.advance(1, f"loss {loss:.3f}  {line['tokens_per_second']:.0f} tokens/s")
            if state.step % section.checkpoint_every == 0 or last or stop.is_set():
                checkpoints.save(run.checkpoints, state, weights, optimizer, section.keep_checkpoints)
            if stop.is_set():
                raise Interrupted(
                    f"stopped after step {state.step} of {schedule.total}; everything is saved",
                    fix="The same command goes on from here.",
                )

    _keep(section, state, model, run)
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "best_step": state.best_step if section.keep_best else None,
        "best_validation_loss": state.best_loss,
        "parameters": {"total": parameters, "trained": trained},
        "precision": state.precision,
        "threads": state.threads,
        "forward": forward.why,
    }


def _load(
    section: TrainSection, inputs: TrainInputs, precision: str, rows: Sequence[Rendered]
) -> tuple[Any, PackedForward, int]:
    """The model with what is trained of it marked, its packed forward, and how many weights the base has."""
    reuse_buffers()
    base = load_model(inputs.model, getattr(torch, precision), inputs.machine.device)
    parameters = sum(p.numel() for p in base.parameters())
    torch.manual_seed(inputs.seed)
    model = section.adapter.attach(base)
    return model, PackedForward(model, rows), parameters


def _keep(section: TrainSection, state: State, model: Any, run: Run) -> None:
    """Write the best weights, or the last, to where the next stages look for them."""
    with whole_folder(run.stage("train") / ("model" if section.adapter.whole_model else "adapter")) as folder:
        if section.keep_best and state.best_step is not None:
            shutil.copytree(run.stage("train") / "best", folder, dirs_exist_ok=True)
        else:
            section.adapter.save(model, folder)


def encode(section: TrainSection, rows: Sequence[Conversation], renderer: Renderer) -> list[Rendered]:
    """Tokens and loss weights of each row.

    Raises:
        DataError: a row has no token to learn from, or is longer than `train.max_length`.
    """
    with bar("Tokens", len(rows)) as progress:
        encoded = []
        for row in rows:
            encoded.append(section.method.encode(row, renderer))
            progress.advance()
    for row, rendered in zip(rows, encoded, strict=True):
        if not rendered.trained:
            raise DataError(
                "no token of this row carries loss",
                where=row.id,
                fix="Check the roles, weights and template.",
            )
        if len(rendered) > section.max_length:
            raise DataError(
                f"has {len(rendered)} tokens, train.max_length is {section.max_length}",
                where=row.id,
                fix="Raise train.max_length, or set data.over_length.",
            )
    return encoded


def _gradients(
    section: TrainSection, forward: PackedForward, rows: Sequence[Rendered], groups: list[list[int]]
) -> tuple[float, float]:
    """Gradients of one optimizer step, clipped: its loss, and the gradient's norm before clipping.

    Raises:
        MachineError: memory ran out.
    """
    method = section.method
    size = sum(method.size(rows[i]) for group in groups for i in group)
    total = 0.0
    try:
        for group in groups:
            # Each pack adds the sum over its tokens, divided by the whole step's: packing changes nothing.
            loss = method.loss(forward, forward.pack([rows[i] for i in group])) / size
            loss.backward()
            total += loss.item()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise MachineError(
            f"memory ran out in a training step ({str(error).splitlines()[0][:200]})",
            where="train.pack_tokens",
            fix=f"Set it lower than {section.pack_tokens} (the result stays the same), or take a smaller model.",
        ) from error
    trained = [p for p in forward.model.parameters() if p.requires_grad]
    return total, torch.nn.utils.clip_grad_norm_(trained, section.clip).item()


def _update(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def _validate(section: TrainSection, forward: PackedForward, rows: Sequence[Rendered]) -> float:
    """Loss per unit of weight over the held-out rows."""
    forward.model.eval()
    total = 0.0
    groups = packs(range(len(rows)), rows, section.pack_tokens)
    with bar("Validating", len(groups)) as progress:
        for group in groups:
            total += section.method.loss(forward, forward.pack([rows[i] for i in group])).item()
            progress.advance()
    forward.model.train()
    return total / sum(section.method.size(r) for r in rows)


def _improved(state: State, loss: float) -> bool:
    if state.best_loss is None or loss < state.best_loss:
        state.best_step, state.best_loss, state.stale = state.step, loss, 0
        return True
    state.stale += 1
    return False


def _stale(section: TrainSection, state: State) -> bool:
    return section.early_stopping is not None and state.stale >= section.early_stopping


def _not_finite(
    values: dict[str, float], state: State, rows: Sequence[Conversation], chosen: Sequence[int], run: Run
) -> TrainingError:
    """The error for the first of some values that is not finite, with the rows it came from."""
    what, value = next((what, value) for what, value in values.items() if not math.isfinite(value))
    names = [rows[i].id for i in chosen if i < len(rows)]
    run.event("not_finite", step=state.step + 1, what=what, value=str(value), rows=names)
    saved = sorted(run.checkpoints.glob("step-*"))
    return TrainingError(
        f"the {what} became {value} in step {state.step + 1}, on rows {', '.join(names)}",
        where=str(run.path),
        fix=(f"The last good weights are kept in {saved[-1]}. " if saved else "")
        + "Look at those rows; a lower train.learning_rate often helps.",
    )


def _forget_after(run: Run, step: int) -> None:
    """Drop the metrics of steps that a kill left without a checkpoint: they will be taken again."""
    kept = [row for row in read_jsonl(run.metrics) if row["step"] <= step]
    write_text(run.metrics, "".join(json_line(row) for row in kept))


def _memory(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that the step at hand can be finished and saved."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(signum: int, frame: object) -> None:
        if stop.is_set():  # asked twice: now
            raise KeyboardInterrupt
        say("Finishing this step and saving; once more to stop at once")
        stop.set()

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
