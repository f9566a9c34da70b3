"""All that steps are made of: rows as examples, a model with what is trained of it, where training stands."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tunesmith.models.packed import PackedForward
from tunesmith.models.plan import Job, empty_model, shape_of
from tunesmith.progress import say
from tunesmith.runs import Run, need_room
from tunesmith.train import auto, checkpoints
from tunesmith.train.batching import Schedule
from tunesmith.train.begin import attached, compared, know_tokens, load, split_over
from tunesmith.train.calibrate import job_of
from tunesmith.train.checkpoints import State
from tunesmith.train.encode import encode
from tunesmith.train.follow import forget_after
from tunesmith.train.inputs import TrainInputs
from tunesmith.train.keep.begin import Keep
from tunesmith.train.neftune import add_noise
from tunesmith.train.objectives.method import Example
from tunesmith.train.optimizers.make import make
from tunesmith.train.parallel.alone import Step
from tunesmith.train.parallel.check import several
from tunesmith.train.section import TrainSection
from tunesmith.train.step import Clock, gradients, no_clock
from tunesmith.train.weights import Trained


@dataclass
class Ready:
    """A training before its next step.

    Attributes:
        section: with a number for every `auto`, which `choices` explain.
        examples, held_out: of the training and of the validation rows.
        known: what the method knows of all examples.
        learned: the weights that are trained; `split` holds them as they are spread over ranks.
        parameters: of the model, without what an adapter adds.
    """

    section: TrainSection
    inputs: TrainInputs
    run: Run
    choices: dict[str, Any]
    examples: list[Example]
    held_out: list[Example]
    schedule: Schedule
    state: State
    model: Any
    classes: list[str]
    learned: Trained
    forward: PackedForward
    known: Any
    split: Any
    keep: Keep
    job: Job
    parameters: int

    def gradients(
        self, step: int, chosen: Sequence[Example], clock: Clock = no_clock
    ) -> tuple[float, dict[str, float], float]:
        """See `step.gradients`; of what a step trains of the model."""
        adapter = self.section.adapter
        if hasattr(adapter, "trained_at"):  # layers in turns
            names = adapter.trained_at(step, list(self.learned.weights), self.inputs.seed)
            self.learned.only(names, self.split.optimizer)
        self.keep.add(step, shared=True)
        return gradients(self.section, self.split, chosen, self.known, partial(self._also, step), clock)

    def _also(self, step: int) -> None:
        self.keep.add(step, shared=False)
        self.section.adapter.regularise(self.model)

    def forget(self) -> None:
        """Begin with a new optimizer."""
        self.split.adopt(make(self.section, self.split.weights, self.section.adapter.rate_of))


def ready(section: TrainSection, inputs: TrainInputs, run: Run) -> Ready:
    """Made anew, or as the newest checkpoint has it."""
    if inputs.ranks.world > 1:
        several(section)
    section.optimizer.check(inputs.machine.device)
    for tracker in section.trackers:
        tracker.check()
    section, choices, examples, held_out = _examples(section, inputs)
    schedule = Schedule.of(len(examples), section.batch_size, section.epochs, section.max_steps, inputs.seed)
    state = _state(section, inputs, run)
    section.method.suits(inputs.renderer)
    own = section.adapter.whole_model  # then float32 weights are loaded, and are the masters of what computes
    base, classes = load(section, inputs, "float32" if own else state.precision, examples)
    know_tokens([*examples, *held_out], base, inputs)
    if own and inputs.ranks.world > 1 and state.precision != "float32":
        say(f"precision float32 in place of {state.precision}: several ranks train a whole model in float32")
        state.precision = "float32"
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
    device = inputs.machine.device
    job = job_of(section, shape, model, learned.weights, state.precision, device, examples, schedule)
    saved = shape.parameters if own else job.trained
    need_room(run.path, 4 * (3 * job.trained * (section.keep_checkpoints + 1) + 2 * saved), "Training")
    split = split_over(section, inputs, Step(model, forward, section.method), learned)
    split.adopt(make(section, split.weights, section.adapter.rate_of))
    keep = Keep(section, inputs, forward, learned.weights)
    if state.step:
        section.adapter.restore(model, checkpoints.restore(run.checkpoints, state, split))
        learned.show()
        say(f"Going on from step {state.step} of {schedule.total}")
    if inputs.ranks.main:
        forget_after(run, state.step)
    model.train()
    return Ready(
        section, inputs, run, choices, examples, held_out, schedule, state, model, classes, learned, forward, known,
        split, keep, job, shape.parameters,
    )  # fmt: skip


def _examples(
    section: TrainSection, inputs: TrainInputs
) -> tuple[TrainSection, dict[str, Any], list[Example], list[Example]]:
    """The section with numbers, why these, and the rows as the method takes them."""
    section, choices = auto.with_length(auto.with_pack(section, inputs.machine), inputs.model)
    with inputs.ranks.main_first() if section.method.models else contextlib.nullcontext():  # another model may answer
        examples = encode(section, inputs.training, inputs.renderer)
        held_out = encode(section, inputs.validation, inputs.renderer)
    if auto.wanted(section):
        section, more = auto.resolve(section, examples, empty_model(inputs.model))
        choices |= more
    if choices:
        say(auto.told(choices))
    return section, choices, examples, held_out


def _state(section: TrainSection, inputs: TrainInputs, run: Run) -> State:
    """Where the newest checkpoint stands, or the beginning."""
    precision, threads = section.precision, torch.get_num_threads()
    begun = State(precision=inputs.machine.precision if precision == "auto" else precision, threads=threads)
    state = inputs.ranks.from_main(lambda: checkpoints.newest(run.checkpoints) or begun)
    if state.threads != threads:
        say(f"going on with {threads} threads after {state.threads}: last digits may differ")
    return state
