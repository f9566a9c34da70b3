"""The training loop."""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith import plugins
from tunesmith.conversation.message import Conversation, tags
from tunesmith.conversation.render import Renderer
from tunesmith.errors import DataError, Interrupted, ModelError, TrainingError
from tunesmith.models.load import CLASSES, load_model, mark_base, refuse_anothers, whole_model
from tunesmith.models.machine import Machine, peak_memory, reuse_buffers
from tunesmith.models.packed import PackedForward
from tunesmith.models.plan import empty_model, estimate, shape_of
from tunesmith.models.quantise import parameter_count, weight_bytes
from tunesmith.models.resolve import ResolvedModel
from tunesmith.progress import bar, say
from tunesmith.runs import Run, hash_file, need_room, read_jsonl, whole_folder, write_json
from tunesmith.train import auto, checkpoints, speed
from tunesmith.train.batching import Schedule, learning_rate
from tunesmith.train.calibrate import calibrate, job_of, out_of_memory
from tunesmith.train.checkpoints import State
from tunesmith.train.follow import Silent, following, forget_after
from tunesmith.train.judge import Ask, Judge, Score
from tunesmith.train.keep.begin import Keep
from tunesmith.train.neftune import add_noise
from tunesmith.train.objectives.method import Batch, Example, Method
from tunesmith.train.optimizers.make import make
from tunesmith.train.parallel.alone import Alone, Step, Turn
from tunesmith.train.parallel.check import several
from tunesmith.train.ranks import Ranks
from tunesmith.train.reference import with_reference
from tunesmith.train.section import TrainSection
from tunesmith.train.weights import Trained


@dataclass(frozen=True)
class TrainInputs:
    """What the loop works on."""

    training: Sequence[Conversation]
    validation: Sequence[Conversation]
    model: ResolvedModel
    renderer: Renderer
    machine: Machine
    seed: int
    ask: Ask | None = None
    score: Score | None = None
    validated: Callable[[int, float], None] | None = None
    general: Mapping[str, Sequence[Conversation]] = field(default_factory=dict)
    """Rows that `train.keep` names, by the path given there."""
    start: Path | None = None
    """The folder of an adapter or model to start from."""
    ranks: Ranks = field(default_factory=Ranks)


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
    base, classes = _load(section, inputs, "float32" if own else state.precision, examples)
    _know_tokens([*examples, *held_out], base, inputs)
    if own and ranks.world > 1:
        state.precision = "float32"  # masters beside rounded weights are one process's
    if own:
        learned = Trained(section.adapter.attach(base))
        learned.round_to(base, getattr(torch, state.precision))
    from_adapter = inputs.start is not None and not own
    if section.method.compares and not from_adapter:
        examples, held_out = _compared(section, inputs, state.precision, base, examples, held_out)
    shape = shape_of(base)
    torch.manual_seed(inputs.seed)
    model = base if own else _attached(section, inputs, base, examples, schedule.total)
    if not own:
        learned = Trained(model)
    if section.method.compares and from_adapter:  # with what it starts from, not with what that once started from
        examples, held_out = _compared(section, inputs, state.precision, model, examples, held_out)
    forward = PackedForward(model, [example.sequences[0] for example in examples], ways=section.speed)
    if section.neftune:
        add_noise(forward, section.neftune)
    known = section.method.start(examples)
    weights = learned.weights
    job = job_of(section, shape, weights, state.precision, examples, schedule)
    trained, parameters = sum(p.numel() for p in weights.values()), shape.parameters
    saved = parameters if section.adapter.whole_model else trained
    need_room(run.path, 4 * (3 * trained * (section.keep_checkpoints + 1) + 2 * saved), "Training")
    split = _split(section, inputs, Step(model, forward, section.method), learned)
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
            _gradients(section, split, [examples[i] for i in chosen], known, partial(also, 0))
            _update(split, 0.0)
            split.forget()

        with bar("Trying the longest step"), out_of_memory(job, "the longest step, tried before the first"):
            measured = calibrate(
                section,
                schedule,
                [e.tokens for e in examples],
                inputs.machine,
                attempt,
                [e.tokens for e in held_out],
                lambda some: _validate(section, split, [held_out[i] for i in some], known),
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
                loss, told, norm = _gradients(section, split, chosen, known, partial(also, state.step))
            if not (math.isfinite(loss) and math.isfinite(norm)):
                kept = section.adapter.state(model)
                checkpoints.save(run.checkpoints, state, split, section.keep_checkpoints, kept)
                raise _not_finite({"loss": loss, "gradient's norm": norm}, state, chosen, run, ranks)
            with follow.clock("step"):
                _update(split, rate)
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
                        found, told = _validate(section, split, held_out, known, tasks)
                    line |= {"validation_loss": found} | {f"validation_{name}": value for name, value in told.items()}
                    if not math.isfinite(found):
                        raise _not_finite({"validation loss": found}, state, held_out[:5], run, ranks)
                    with follow.clock("samples"):
                        judged, higher = ranks.from_main(lambda: (judge(forward, state.step), judge.higher_is_better))
                        line |= judged
                    if _improved(state, found, line[f"validation_{section.best_by}"], higher) and section.keep_best:
                        with follow.clock("checkpoint"), learned.unrounded():
                            _save(section, split, run.stage("train") / "best")
            follow.step(line, norms, partial(_by_loss, section, split, chosen, known))
            if inputs.validated and ranks.main and "validation_loss" in line:
                inputs.validated(state.step, line[f"validation_{section.best_by}"])
            stopping = ranks.any(stop.is_set())
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
        _keep(section, state, split, inputs.model, classes, run)
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


def _load(
    section: TrainSection, inputs: TrainInputs, precision: str, examples: Sequence[Example]
) -> tuple[Any, list[str]]:
    """The base model (or the whole model that training starts from) as it is before training, and what its head tells
    apart if that is not the language."""
    reuse_buffers()
    source = inputs.model
    if inputs.start and section.adapter.whole_model:
        source = replace(source, path=whole_model(inputs.start), new_words=())
    classes = section.method.classes(examples)
    torch.manual_seed(inputs.seed)  # behind a new head's weights
    dtype, lost_rank = getattr(torch, precision), section.adapter.lost_rank
    base = load_model(source, dtype, inputs.machine.device, classes, section.quantise, lost_rank)
    if classes:
        base.config.pad_token_id = _padding(inputs.renderer, examples)
    how = f" ({section.quantise})" if section.quantise else ""
    say(f"{parameter_count(base):,} weights in {weight_bytes(base) / 2**20:,.0f} MiB{how}")
    return base, classes


def _know_tokens(examples: Sequence[Example], base: Any, inputs: TrainInputs) -> None:
    """Raise where the tokenizer writes a token that the model has no embedding of."""
    size = base.get_input_embeddings().weight.shape[0]
    for example in examples:
        highest = max(max(sequence.ids) for sequence in example.sequences + example.beside)
        if highest >= size:
            token = inputs.renderer.tokenizer.convert_ids_to_tokens(highest)
            raise ModelError(
                f"row {example.row} has '{token}', the tokenizer's number {highest}, and the model knows {size} tokens",
                where=str(inputs.model.path),
                fix="Put the tokenizer that belongs to the model there; it is another's, or tokens were added to it.",
            )


def _padding(renderer: Renderer, examples: Sequence[Example]) -> int | None:
    """A special token that ends no sequence: transformers reads a score before the last token that is not padding."""
    ends = {sequence.ids[-1] for example in examples for sequence in example.sequences}
    return next((i for i in sorted(renderer.tokenizer.all_special_ids) if i not in ends), None)


def _attached(section: TrainSection, inputs: TrainInputs, base: Any, examples: list[Example], steps: int) -> Any:
    """The base with an adapter on it, at its start."""
    model = section.adapter.attach(base)
    section.adapter.begin(model, [example.sequences[0] for example in examples], steps)
    if inputs.start:
        refuse_anothers(inputs.model, inputs.start)
        section.adapter.load(model, inputs.start)
    return model


def _compared(
    section: TrainSection,
    inputs: TrainInputs,
    precision: str,
    model: Any,
    *parts: list[Example],
) -> tuple[list[Example], ...]:
    """The examples of each part with the log-probabilities that the model gives them before it is trained; every
    rank computes a share."""
    model.eval()
    ranks = inputs.ranks
    forward = PackedForward(model, [example.sequences[0] for example in parts[0]])
    started = [hash_file(path) for path in sorted(inputs.start.glob("*.safetensors"))] if inputs.start else []
    name = " ".join([f"{inputs.model.identity} in {section.quantise or precision}", *started])
    found = []
    for part in parts:
        shares = ranks.share(range(len(part)), lambda i, part=part: part[i].tokens)  # type: ignore[misc]
        mine = with_reference([part[i] for i in shares[ranks.rank]], forward, name, section.pack_tokens)
        whole = list(part)
        for share, made in zip(shares, ranks.all(mine), strict=True):
            for i, example in zip(share, made, strict=True):
                whole[i] = example
        found.append(whole)
    forward.undo()
    return tuple(found)


def _split(section: TrainSection, inputs: TrainInputs, step: Step, learned: Trained) -> Alone:
    """What the loop works through: the model as it is, or its part of what several ranks train."""
    ranks = inputs.ranks
    if ranks.world == 1:
        return Alone(ranks, step, learned.weights)
    ranks.same(
        p.data for p in step.parameters() if p.is_floating_point()
    )  # an adapter's start may be computed, and round otherwise there
    torch.manual_seed(inputs.seed + ranks.rank)  # dropout: every rank its own
    say(f"{ranks.world} ranks, {section.parallel.kind}; {torch.get_num_threads()} threads each")
    made: Alone = section.parallel.over(ranks, step, learned.weights)
    learned.weights = learned.model = made.weights  # float32, so the model's own; parted ones are others than before
    return made


def _following(ranks: Ranks, *told: Any) -> contextlib.AbstractContextManager[Any]:
    """What looks on, on the first rank alone."""
    return following(*told) if ranks.main else contextlib.nullcontext(Silent())


def _save(section: TrainSection, split: Alone, target: Path) -> None:
    """Write the tuned weights; every rank gives its part, the first one writes."""
    with split.whole() as model:
        if split.ranks.main:
            with whole_folder(target) as folder:
                section.adapter.save(model, folder)


def _keep(section: TrainSection, state: State, split: Alone, base: ResolvedModel, classes: list[str], run: Run) -> None:
    """Write the best weights, or the last, to where the next stages look for them."""
    target = run.stage("train") / ("model" if section.adapter.whole_model else "adapter")
    best = run.stage("train") / "best" if section.keep_best and state.best_step is not None else None
    with split.whole() if best is None else contextlib.nullcontext(split.model) as model:
        if not split.ranks.main:
            return
        with whole_folder(target) as folder:
            if best is None:
                section.adapter.save(model, folder)
            else:
                shutil.copytree(best, folder, dirs_exist_ok=True)
            if classes:
                padding = split.model.config.pad_token_id
                write_json(folder / CLASSES, {"classes": classes, "pad_token_id": padding})
            if not section.adapter.whole_model:
                mark_base(folder, base)


def encode(section: TrainSection, rows: Sequence[Conversation], renderer: Renderer) -> list[Example]:
    """What the method makes of the rows.

    Raises:
        DataError: rows are of another kind than the method learns from; or one has no token to learn from, or is
            longer than `train.max_length`.
    """
    method: Method = section.method
    other = next((row for row in rows if row.kind != method.takes), None)
    if other is not None:
        fitting = [name for name in sorted(plugins.known("objective")) if _takes(name) == other.kind]
        raise DataError(
            f"method {method.kind} learns from {method.takes} rows, and this is a {other.kind} row",
            where=other.id,
            fix=f"Take train.method: {' or '.join(fitting)}; or say how to read the rows otherwise: layout, columns.",
        )
    examples: list[Example] = []
    with bar("Tokens", len(rows)) as progress:
        for made in method.encode(rows, renderer, section.max_length):
            examples += made
            progress.advance()
    for example in examples:
        if not all(sequence.trained for sequence in example.sequences):
            raise DataError(
                "no token of this row carries loss",
                where=example.row,
                fix="Check the roles, weights and template.",
            )
        if len(example) > section.max_length:
            raise DataError(
                f"has {len(example)} tokens, train.max_length is {section.max_length}",
                where=example.row,
                fix="Raise train.max_length, or set data.over_length.",
            )
    return examples


def _takes(method: str) -> str:
    found: type[Method] = plugins.load("objective", method)
    return found.takes


def _batches(
    section: TrainSection,
    split: Alone,
    examples: Sequence[Example],
    known: Any,
    parts: Sequence[Sequence[Example]] = (),
) -> tuple[Counter[str], Iterator[tuple[Batch, Turn]]]:
    """The sizes that the terms of these examples' loss are divided by, and this rank's examples in packs. `parts`: the
    same examples in parts of which no pack holds two."""
    method: Method = section.method

    def packed(
        chosen: Sequence[Example], sequences: list[tuple[Any, ...]], shared: bool
    ) -> Iterator[tuple[list[Example], Any, Turn]]:
        for turn in split.turns(sequences, section.pack_tokens, shared):
            rows, counts = [s for i in turn.group for s in sequences[i]], [len(sequences[i]) for i in turn.group]
            yield [chosen[i] for i in turn.group], split.step.packed.pack(rows, counts), turn

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


def _gradients(
    section: TrainSection,
    split: Alone,
    examples: Sequence[Example],
    known: Any,
    also: Callable[[], None],
) -> tuple[float, dict[str, float], float]:
    """Gradients of one optimizer step, clipped: its loss, figures beside it, and the norm before clipping.

    `also` adds other terms' gradients before they are clipped.
    """
    total, told = 0.0, _Means()
    sizes, batches = _batches(section, split, examples, known)
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


def _added(ranks: Ranks, losses: dict[str, float], told: _Means) -> tuple[dict[str, float], dict[str, float]]:
    """The ranks' losses added up, by name, and the means of their figures."""
    if ranks.world == 1:
        return losses, told.values
    found, means = ranks.all((losses, told.sums)), _Means()
    for _, sums in found:
        means.add(sums)
    names = sorted({name for mine, _ in found for name in mine})
    return {name: math.fsum(mine.get(name, 0.0) for mine, _ in found) for name in names}, means.values


class _Means:
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


def _update(split: Alone, rate: float) -> None:
    for group in split.optimizer.param_groups:
        group["lr"] = rate * group["share"]
    split.update()


@torch.no_grad()
def _validate(
    section: TrainSection, split: Alone, examples: Sequence[Example], known: Any, tasks: Mapping[str, str] | None = None
) -> tuple[float, dict[str, float]]:
    """The loss of the held-out rows as if they were one step, and the figures beside it.

    Args:
        tasks: the tags of rows, by their ids; then the loss of each tag's rows alone is among the figures (`loss_TAG`).
    """
    split.run.eval()
    losses, told = {"loss": 0.0}, _Means()
    parts: dict[str, list[Example]] = {}
    for example in examples:
        parts.setdefault(f"loss_{tasks[example.row]}" if tasks and example.row in tasks else "", []).append(example)
    sizes = {name: _sizes(section.method, part) for name, part in parts.items()}
    whole, batches = _batches(section, split, examples, known, list(parts.values()))
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


def _by_loss(section: TrainSection, split: Alone, examples: Sequence[Example], known: Any) -> list[str]:
    """The names of some examples' rows, those with the highest loss first (several ranks: as they come, since only
    the first rank asks)."""
    if split.ranks.world > 1:
        return list(dict.fromkeys(example.row for example in examples))
    with torch.random.fork_rng():
        losses = {example.row: _validate(section, split, [example], known)[0] for example in examples}
    return sorted(losses, key=lambda name: -losses[name])


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
