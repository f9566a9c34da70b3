"""The training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from tunesmith.conversation.message import tags
from tunesmith.errors import Interrupted, TrainingError
from tunesmith.models.machine import peak_memory
from tunesmith.models.packed import PackedForward
from tunesmith.models.plan import empty_model, estimate, shape_of
from tunesmith.progress import bar, say
from tunesmith.runs import Run, need_room, read_jsonl
from tunesmith.train import auto, checkpoints, speed
from tunesmith.train.batching import Schedule, learning_rate
from tunesmith.train.begin import attached, compared, know_tokens, load, split_over
from tunesmith.train.calibrate import calibrate, job_of, out_of_memory
from tunesmith.train.checkpoints import State
from tunesmith.train.encode import encode
from tunesmith.train.follow import Silent, following, forget_after
from tunesmith.train.inputs import TrainInputs
from tunesmith.train.judge import Judge
from tunesmith.train.keep.begin import Keep
from tunesmith.train.neftune import add_noise
from tunesmith.train.objectives.method import Example
from tunesmith.train.optimizers.make import make
from tunesmith.train.parallel.alone import Step
from tunesmith.train.parallel.check import several
from tunesmith.train.ranks import Ranks
from tunesmith.train.results import keep_weights, save, snapshot
from tunesmith.train.section import TrainSection
from tunesmith.train.step import by_loss, gradients, update, validate
from tunesmith.train.weights import Trained


def train(section: TrainSection, inputs: TrainInputs, run: Run) -> dict[str, Any]:
    """Train into `run.tuned`, going on from the newest checkpoint if there is one.

    Returns what the manifest tells of it: steps, tokens, best step, precision, which forward was used.

    Raises:
        TrainingError: the loss or the gradient is not finite; names the rows of that step.
        Interrupted: on Ctrl-C or SIGTERM, once the step is finished and saved.
    """
    ranks = inputs.ranks
    if ranks.world > 1:
        several(section)
    section.optimizer.check(inputs.machine.device)
    section, choices = auto.with_length(section, inputs.model)
    examples = encode(section, inputs.training, inputs.renderer)
    held_out = encode(section, inputs.validation, inputs.renderer)
    if auto.wanted(section):
        section, more = auto.resolve(section, examples, empty_model(inputs.model))
        choices |= more
    if choices:
        say(auto.told(choices))
    schedule = Schedule.of(len(examples), section.batch_size, section.epochs, section.max_steps, inputs.seed)
    validate_every = section.validate_every or schedule.steps_per_epoch
    state = ranks.from_main(
        lambda: (
            checkpoints.newest(run.checkpoints)
            or State(
                precision=inputs.machine.precision if section.precision == "auto" else section.precision,
                threads=torch.get_num_threads(),
            )
        )
    )
    if state.threads != torch.get_num_threads():
        say(f"going on with {torch.get_num_threads()} threads after {state.threads}: last digits may differ")

    section.method.suits(inputs.renderer)
    own = section.adapter.whole_model  # then float32 weights are loaded, and are the masters of what computes
    base, classes = load(section, inputs, "float32" if own else state.precision, examples)
    know_tokens([*examples, *held_out], base, inputs)
    if own and ranks.world > 1:
        state.precision = "float32"  # masters beside rounded weights are one process's
    if own:
        learned = Trained(section.adapter.attach(base))
        learned.round_to(base, getattr(torch, state.precision))
    from_adapter = inputs.start is not None and not own
    if section.method.compares and not from_adapter:
        examples, held_out = compared(section, inputs, state.precision, base, examples, held_out)
    shape = shape_of(base)
    torch.manual_seed(inputs.seed)
    model = base if own else attached(section, inputs, base, examples, schedule.total)
    if not own:
        learned = Trained(model)
    if section.method.compares and from_adapter:  # with what it starts from, not with what that once started from
        examples, held_out = compared(section, inputs, state.precision, model, examples, held_out)
    forward = PackedForward(model, [example.sequences[0] for example in examples], ways=section.speed)
    if section.neftune:
        add_noise(forward, section.neftune)
    known = section.method.start(examples)
    weights = learned.weights
    job = job_of(section, shape, weights, state.precision, examples, schedule)
    trained, parameters = sum(p.numel() for p in weights.values()), shape.parameters
    saved = parameters if section.adapter.whole_model else trained
    need_room(run.path, 4 * (3 * trained * (section.keep_checkpoints + 1) + 2 * saved), "Training")
    split = split_over(section, inputs, Step(model, forward, section.method), learned)
    split.adopt(make(section, split.weights, section.adapter.rate_of))
    keep = Keep(section, inputs, forward, weights)
    if state.step:
        section.adapter.restore(model, checkpoints.restore(run.checkpoints, state, split))
        learned.show()
        say(f"Going on from step {state.step} of {schedule.total}")
    if ranks.main:
        forget_after(run, state.step)
    judge = Judge(section, inputs.validation, inputs.seed, inputs.ask if split.whole_here else None, inputs.score, run)
    used = speed.used(section, forward, state.precision)
    say("speed: " + ", ".join(used))
    expected = estimate(job, inputs.machine)

    def also(step: int) -> None:
        keep.at(step)()
        section.adapter.regularise(model)

    tasks = {inputs.validation[i].id: tag for tag, places in tags(inputs.validation).items() for i in places}
    in_turns = hasattr(section.adapter, "trained_at")
    model.train()
    measured = None
    if not state.step and schedule.total:
        start = State(state.precision, state.threads)

        def attempt(chosen: Sequence[int]) -> None:
            if in_turns:
                learned.only(section.adapter.trained_at(0, list(weights), inputs.seed), split.optimizer)
            gradients(section, split, [examples[i] for i in chosen], known, partial(also, 0))
            update(split, 0.0)
            split.forget()

        with bar("Trying the longest step"), out_of_memory(job, "the longest step, tried before the first"):
            measured = calibrate(
                section,
                schedule,
                [e.tokens for e in examples],
                inputs.machine,
                attempt,
                [e.tokens for e in held_out],
                lambda some: validate(section, split, [held_out[i] for i in some], known),
                lambda: checkpoints.save(run.checkpoints, start, split, section.keep_checkpoints),
            )
        split.adopt(make(section, split.weights, section.adapter.rate_of))
        checkpoints.restore(run.checkpoints, start, split)
        learned.show()
        ranks.meet()
        if ranks.main:
            checkpoints.remove(run.checkpoints, start)
        say(measured.correct(expected))
    if ranks.main:
        run.event("train_started", step=state.step, total=schedule.total, forward=forward.why, ranks=ranks.world)

    seconds = measured.seconds if measured else expected.seconds
    with (
        _stop_requests() as stop,
        _following(ranks, run, section, list(split.weights), schedule.total, state.step, seconds) as follow,
        out_of_memory(job, "a training step"),
    ):
        while state.step < schedule.total and not _stale(section, state):
            chosen = [examples[i] for i in schedule.step(state.step)]
            rate = learning_rate(
                state.step, schedule.total, section.learning_rate, section.warmup, section.schedule, section.decay
            )
            began = time.perf_counter()
            with follow.clock("step"):
                if in_turns:
                    learned.only(section.adapter.trained_at(state.step, list(weights), inputs.seed), split.optimizer)
                loss, told, norm = gradients(section, split, chosen, known, partial(also, state.step))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = section.adapter.state(model)
                checkpoints.save(run.checkpoints, state, split, section.keep_checkpoints, kept)
                raise _not_finite({"loss": loss, "gradient's norm": norm}, state, chosen, run, ranks)
            with follow.clock("step"):
                update(split, rate)
                section.adapter.after_step(model, state.step + 1)
                split.forget()
                learned.show()
                norms = split.norms()
            if not norms.isfinite().all():
                raise _not_finite({"weights": math.nan}, state, chosen, run, ranks)
            tokens, took = sum(e.tokens for e in chosen), time.perf_counter() - began
            state.step, state.tokens, state.seconds = state.step + 1, state.tokens + tokens, state.seconds + took
            line: dict[str, Any] = {
                "step": state.step,
                "epoch": round(state.step / schedule.steps_per_epoch, 4),
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": tokens,
                "tokens_per_second": round(tokens / took, 1),
                "memory_bytes": int(max(ranks.gather(peak_memory(inputs.machine.device)))),
                **told,
                **keep.figures,
            }
            last = state.step == schedule.total
            if held_out and (state.step % validate_every == 0 or last):
                with learned.as_used(split.optimizer):
                    with follow.clock("validation"):
                        found, told = validate(section, split, held_out, known, tasks)
                    line |= {"validation_loss": found} | {f"validation_{name}": value for name, value in told.items()}
                    if not math.isfinite(found):
                        raise _not_finite({"validation loss": found}, state, held_out[:5], run, ranks)
                    with follow.clock("samples"):
                        judged, higher = ranks.from_main(lambda: (judge(forward, state.step), judge.higher_is_better))
                        line |= judged
                    if _improved(state, found, line[f"validation_{section.best_by}"], higher) and section.keep_best:
                        with follow.clock("checkpoint"), learned.unrounded():
                            save(section, split, run.stage("train") / "best")
            follow.step(line, norms, partial(by_loss, section, split, chosen, known))
            if inputs.validated and ranks.main and "validation_loss" in line:
                inputs.validated(state.step, line[f"validation_{section.best_by}"])
            stopping = ranks.any(stop.is_set())
            if section.snapshots and (state.step % schedule.steps_per_epoch == 0 or last or stopping):
                with follow.clock("checkpoint"), learned.as_used(split.optimizer), learned.unrounded():
                    snapshot(section, state, split, inputs.model, classes, run)
            if state.step % section.checkpoint_every == 0 or last or stopping:
                with follow.clock("checkpoint"):
                    kept = section.adapter.state(model)
                    checkpoints.save(run.checkpoints, state, split, section.keep_checkpoints, kept)
            if stopping:
                raise Interrupted(
                    f"stopped after step {state.step} of {schedule.total}; everything is saved",
                    fix="The same command goes on from here.",
                )

    with learned.as_used(split.optimizer), learned.unrounded():
        keep_weights(section, state, split, inputs.model, classes, run)
    last = (read_jsonl(run.metrics) or [{}])[-1]
    return {
        "steps": state.step,
        "tokens": state.tokens,
        "seconds": round(state.seconds, 1),
        "best_step": state.best_step if section.keep_best else None,
        "best_validation_loss": state.best_loss,
        "best_by": section.best_by,
        "best_value": state.best_value,
        "parameters": {"total": parameters, "trained": trained},
        "precision": state.precision,
        "threads": state.threads,
        "forward": forward.why,
        "ranks": ranks.world,
        "parallel": section.parallel.kind if ranks.world > 1 else None,
        "auto": {key: asdict(choice) for key, choice in choices.items()},
        "plan": {"seconds": expected.seconds, "peak_bytes": expected.peak_bytes},
        "measured": measured.as_dict() if measured else None,
        "findings": read_jsonl(run.findings),
        "speed": used,
        "tasks": {
            tag: last[name] for tag in dict.fromkeys(tasks.values()) if (name := f"validation_loss_{tag}") in last
        },
        "keep": {k: v for k, v in last.items() if k.startswith("keep_")},
    }


def _following(ranks: Ranks, *told: Any) -> contextlib.AbstractContextManager[Any]:
    """What looks on, on the first rank alone."""
    return following(*told) if ranks.main else contextlib.nullcontext(Silent())


def _improved(state: State, loss: float, value: float, higher: bool) -> bool:
    """Whether a validation is the best so far, which the state then holds."""
    if state.best_value is None or (value > state.best_value if higher else value < state.best_value):
        state.best_step, state.best_loss, state.best_value, state.stale = state.step, loss, value, 0
        return True
    state.stale += 1
    return False


def _stale(section: TrainSection, state: State) -> bool:
    return section.early_stopping is not None and state.stale >= section.early_stopping


def _not_finite(
    values: dict[str, float], state: State, examples: Sequence[Example], run: Run, ranks: Ranks
) -> TrainingError:
    """The error for the first of some values that is not finite, with the rows it came from."""
    what, value = next((what, value) for what, value in values.items() if not math.isfinite(value))
    names = list(dict.fromkeys(example.row for example in examples))
    if ranks.main:
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
