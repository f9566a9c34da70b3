"""The training loop."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from tunesmith.conversation.message import tags
from tunesmith.errors import DataError, Interrupted, TrainingError
from tunesmith.models.machine import give_back_above, peak_memory
from tunesmith.models.plan import Plan, estimate
from tunesmith.progress import bar, say
from tunesmith.runs import Run, read_jsonl
from tunesmith.train import checkpoints, speed
from tunesmith.train.batching import learning_rate
from tunesmith.train.calibrate import Measured, calibrate, out_of_memory
from tunesmith.train.checkpoints import State
from tunesmith.train.follow import Silent, following
from tunesmith.train.inputs import TrainInputs
from tunesmith.train.judge import Judge
from tunesmith.train.objectives.method import Example
from tunesmith.train.ranks import Ranks
from tunesmith.train.ready import Ready, ready
from tunesmith.train.results import best_of, keep_weights, save, snapshot
from tunesmith.train.section import TrainSection
from tunesmith.train.step import by_loss, update, validate

SLACK = 1.1  # memory may grow by so much beyond what the longest step took


def train(section: TrainSection, inputs: TrainInputs, run: Run) -> dict[str, Any]:
    """Train into `run.tuned`, going on from the newest checkpoint if there is one.

    Returns what the manifest tells of it: steps, tokens, best step, precision, which forward was used.

    Raises:
        TrainingError: the loss or the gradient is not finite; names the rows of that step.
        Interrupted: on Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    at, ranks = ready(section, inputs, run), inputs.ranks
    section, state, total = at.section, at.state, at.schedule.total
    ask = inputs.ask if at.split.whole_here else None
    judge = Judge(section, inputs.validation, inputs.seed, ask, inputs.score)
    used = speed.used(section, at.forward, state.precision)
    say("speed: " + ", ".join(used))
    expected, measured = estimate(at.job, inputs.machine), None
    if not state.step and total:
        measured = _tried(at, judge)
        say(measured.correct(expected))
    if ranks.main:
        run.event("train_started", step=state.step, total=total, forward=at.forward.why, ranks=ranks.world)
    tasks = {inputs.validation[i].id: tag for tag, places in tags(inputs.validation).items() for i in places}
    validate_every = section.validate_every or at.schedule.steps_per_epoch
    seconds = measured.seconds if measured else expected.seconds
    most = SLACK * (measured.peak_bytes if measured else expected.peak_bytes)
    with (
        _stop_requests() as stop,
        _following(ranks, run, section, list(at.split.weights), total, state.step, seconds) as follow,
        out_of_memory(at.job, "a training step"),
    ):
        while state.step < total and not _stale(section, state):
            chosen = [at.examples[i] for i in at.schedule.step(state.step)]
            line, norms = _step(at, chosen, follow)
            if at.held_out and (state.step % validate_every == 0 or state.step == total):
                _validated(at, judge, tasks, line, follow)
            follow.step(line, norms, partial(by_loss, section, at.split, chosen, at.known))
            if inputs.validated and ranks.main and "validation_loss" in line:
                inputs.validated(state.step, _value(section, line))
            stopping = ranks.any(stop.is_set())
            _saved(at, stopping, follow)
            if inputs.machine.device == "cpu":
                give_back_above(most)
            if stopping:
                raise Interrupted(
                    f"stopped after step {state.step} of {total}; everything is saved",
                    fix="The same command goes on from here.",
                )
    with at.learned.as_used(at.split.optimizer), at.learned.unrounded():
        keep_weights(section, state, at.split, inputs.model, at.classes, run)
    return _told(at, used, expected, measured, tasks)


def _tried(at: Ready, judge: Judge) -> Measured:
    """What the longest step, one of usual size, a validation and a checkpoint take; all is as it was after that. An
    answer is tried, too, and writing the best weights."""
    start = State(at.state.precision, at.state.threads)

    def attempt(chosen: Sequence[int]) -> None:
        at.gradients(0, [at.examples[i] for i in chosen])
        update(at.split, 0.0)
        at.split.forget()

    with bar("Trying the longest step"), out_of_memory(at.job, "the longest step, tried before the first"):
        measured = calibrate(
            at.section,
            at.schedule,
            [e.tokens for e in at.examples],
            at.inputs.machine,
            attempt,
            [e.tokens for e in at.held_out],
            lambda some: validate(at.section, at.split, [at.held_out[i] for i in some], at.known),
            lambda: checkpoints.save(at.run.checkpoints, start, at.split, at.section.keep_checkpoints),
        )
    if at.held_out:
        with at.learned.as_used(at.split.optimizer):
            with out_of_memory(at.job, "an answer, tried before the first step"):
                at.inputs.ranks.from_main(lambda: judge.attempt(at.forward))
            if at.section.keep_best:
                with at.learned.unrounded():
                    save(at.section, at.split, best_of(at.run))
    at.forget()
    checkpoints.restore(at.run.checkpoints, start, at.split)
    at.learned.show()
    at.inputs.ranks.meet()
    if at.inputs.ranks.main:
        checkpoints.remove(at.run.checkpoints, start)
        shutil.rmtree(best_of(at.run), ignore_errors=True)
    return measured


def _step(at: Ready, chosen: Sequence[Example], follow: Any) -> tuple[dict[str, Any], Tensor]:
    """Take a step; what the metrics tell of it, and its gradients' norms."""
    section, state, split = at.section, at.state, at.split
    rate = learning_rate(
        state.step, at.schedule.total, section.learning_rate, section.warmup, section.schedule, section.decay
    )
    began = time.perf_counter()
    with follow.clock("step"):
        loss, told, norm = at.gradients(state.step, chosen, follow.clock)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        kept = section.adapter.state(at.model)
        checkpoints.save(at.run.checkpoints, state, split, section.keep_checkpoints, kept)
        raise _not_finite({"loss": loss, "gradient's norm": norm}, at, chosen)
    with follow.clock("step"):
        update(split, rate)
        section.adapter.after_step(at.model, state.step + 1)
        split.forget()
        at.learned.show()
        norms: Tensor = split.norms()
    if not norms.isfinite().all():
        raise _not_finite({"weights": math.nan}, at, chosen)
    tokens, took = sum(e.tokens for e in chosen), time.perf_counter() - began
    state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, state.seconds + took
    return {
        "step": state.step,
        "epoch": round(state.step / at.schedule.steps_per_epoch, 4),
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "tokens_per_second": round(tokens / took, 1),
        "memory_bytes": int(max(at.inputs.ranks.gather(peak_memory(at.inputs.machine.device)))),
        **told,
        **at.keep.figures,
    }, norms


def _validated(at: Ready, judge: Judge, tasks: dict[str, str], line: dict[str, Any], follow: Any) -> None:
    """Put a validation into the step's line, and keep the weights if they are the best so far."""
    section, state, split, ranks = at.section, at.state, at.split, at.inputs.ranks
    with at.learned.as_used(split.optimizer):
        with follow.clock("validation"):
            found, told = validate(section, split, at.held_out, at.known, tasks)
        line |= {"validation_loss": found} | {f"validation_{name}": value for name, value in told.items()}
        if not math.isfinite(found):
            raise _not_finite({"validation loss": found}, at, at.held_out[:5])
        with follow.clock("samples"):
            judged, higher = ranks.from_main(
                lambda: (judge(at.forward, state.step, follow.samples), judge.higher_is_better)
            )
            line |= judged
        if _improved(state, found, _value(section, line), higher) and section.keep_best:
            with follow.clock("checkpoint"), at.learned.unrounded():
                save(section, split, best_of(at.run))


def _saved(at: Ready, stopping: bool, follow: Any) -> None:
    """Write the snapshot and the checkpoint that are due after this step."""
    section, state, split = at.section, at.state, at.split
    now = stopping or state.step == at.schedule.total
    if section.snapshots and (now or state.step % at.schedule.steps_per_epoch == 0):
        with follow.clock("checkpoint"), at.learned.as_used(split.optimizer), at.learned.unrounded():
            snapshot(section, state, split, at.inputs.model, at.classes, at.run)
    if now or state.step % section.checkpoint_every == 0:
        with follow.clock("checkpoint"):
            kept = section.adapter.state(at.model)
            checkpoints.save(at.run.checkpoints, state, split, section.keep_checkpoints, kept)


def _told(
    at: Ready, used: list[str], expected: Plan, measured: Measured | None, tasks: dict[str, str]
) -> dict[str, Any]:
    """What the manifest tells."""
    section, state, ranks = at.section, at.state, at.inputs.ranks
    last = (read_jsonl(at.run.metrics) or [{}])[-1]
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "best_step": state.best_step if section.keep_best else None,
        "best_validation_loss": state.best_loss,
        "best_by": section.best_by,
        "best_value": state.best_value,
        "parameters": {"total": at.parameters, "trained": at.job.trained},
        "precision": state.precision,
        "threads": state.threads,
        "forward": at.forward.why,
        "ranks": ranks.world,
        "parallel": section.parallel.kind if ranks.world > 1 else None,
        "auto": {key: asdict(choice) for key, choice in at.choices.items()},
        "plan": {"seconds": expected.seconds, "peak_bytes": expected.peak_bytes},
        "measured": measured.as_dict() if measured else None,
        "findings": read_jsonl(at.run.findings),
        "speed": used,
        "tasks": {
            tag: last[name] for tag in dict.fromkeys(tasks.values()) if (name := f"validation_loss_{tag}") in last
        },
        "keep": {k: v for k, v in last.items() if k.startswith("keep_")},
    }


def _following(ranks: Ranks, *told: Any) -> contextlib.AbstractContextManager[Any]:
    """What looks on, on the first rank alone."""
    return following(*told) if ranks.main else contextlib.nullcontext(Silent())


def _value(section: TrainSection, line: dict[str, Any]) -> float:
    """What the best weights are best by, of a line with a validation."""
    told = {name.removeprefix("validation_"): value for name, value in line.items() if name.startswith("validation_")}
    if section.best_by not in told:
        raise DataError(
            f"is {section.best_by}, and the validation rows only tell {', '.join(told)}",
            where="train.best_by",
            fix="Take one of those.",
        )
    value: float = told[section.best_by]
    return value


def _improved(state: State, loss: float, value: float, higher: bool) -> bool:
    """Whether a validation is the best so far, which the state then holds."""
    if state.best_value is None or (value > state.best_value if higher else value < state.best_value):
        state.best_step, state.best_loss, state.best_value, state.stale = state.step, loss, value, 0
        return True
    state.stale += 1
    return False


def _stale(section: TrainSection, state: State) -> bool:
    return section.early_stopping is not None and state.stale >= section.early_stopping


def _not_finite(values: dict[str, float], at: Ready, examples: Sequence[Example]) -> TrainingError:
    """The error for the first of some values that is not finite, with the rows it came from."""
    what, value = next((what, value) for what, value in values.items() if not math.isfinite(value))
    names = list(dict.fromkeys(example.row for example in examples))
    state, run = at.state, at.run
    if at.inputs.ranks.main:
        run.event("not_finite", step=state.step + 1, what=what, value=str(value), rows=names)
    saved = sorted(run.checkpoints.glob("step-*"))
    return TrainingError(
        f"the {what} became {value} in step {state.step + 1}, on rows {', '.join(names)}",
        where=str(run.path),
        fix=(f"The last good weights are kept in {saved[-1]}. " if saved else "")
        + "Look at those rows; a lower train.learning_rate often helps.",
    )


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
