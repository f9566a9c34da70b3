"""The model as training begins with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.models.load import load_model, refuse_anothers, refuse_spoilt, whole_model
from tunesmith.models.machine import reuse_buffers
from tunesmith.models.packed import PackedForward
from tunesmith.models.plan import empty_model
from tunesmith.models.quantise import parameter_count, weight_bytes
from tunesmith.progress import say
from tunesmith.runs import hash_file
from tunesmith.train.inputs import TrainInputs
from tunesmith.train.objectives.method import Example
from tunesmith.train.parallel.alone import Alone, Step
from tunesmith.train.reference import with_reference
from tunesmith.train.section import TrainSection
from tunesmith.train.weights import Trained


def load(
    section: TrainSection, inputs: TrainInputs, precision: str, examples: Sequence[Example]
) -> tuple[Any, list[str]]:
    """The base model (or the whole model that training starts from) as it is before training, and what its head tells
    apart if that is not the language."""
    source = inputs.model
    if inputs.start and section.adapter.whole_model:
        source = replace(source, path=whole_model(inputs.start), new_words=())
    classes = section.method.classes(examples)
    torch.manual_seed(inputs.seed)  # behind a new head's weights
    dtype, lost_rank = getattr(torch, precision), section.adapter.lost_rank
    # A quantised weight is made whole for each product: such buffers would leave the heap in pieces, as large as the
    # weights as they were.
    reuse_buffers(**({"below": 2**20} if section.quantise else {}))
    if section.quantise:  # the base as it is must take the adapter, too, when it is evaluated
        section.adapter.attach(empty_model(source))
    base = load_model(source, dtype, inputs.machine.device, classes, section.quantise, lost_rank)
    if classes:
        base.config.pad_token_id = _padding(inputs.renderer, examples)
    how = f" ({section.quantise})" if section.quantise else ""
    say(f"{parameter_count(base):,} weights in {weight_bytes(base) / 2**20:,.0f} MiB{how}")
    return base, classes


def know_tokens(examples: Sequence[Example], base: Any, inputs: TrainInputs) -> None:
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


def attached(section: TrainSection, inputs: TrainInputs, base: Any, examples: list[Example], steps: int) -> Any:
    """The base with an adapter on it, at its start."""
    model = section.adapter.attach(base)
    section.adapter.begin(model, [example.sequences[0] for example in examples], steps)
    if inputs.start:
        refuse_anothers(inputs.model, inputs.start)
        refuse_spoilt(inputs.start)
        section.adapter.load(model, inputs.start)
    return model


def compared(
    section: TrainSection,
    inputs: TrainInputs,
    precision: str,
    model: Any,
    *parts: list[Example],
) -> tuple[list[Example], ...]:
    """The examples of each part with the log-probabilities that the model gives them before it is trained; every
    rank computes a share."""
    model.eval()
    forward = PackedForward(model, [example.sequences[0] for example in parts[0]])
    started = [hash_file(path) for path in sorted(inputs.start.glob("*.safetensors"))] if inputs.start else []
    name = " ".join([f"{inputs.model.identity} in {section.quantise or precision}", *started])
    found = tuple(with_reference(part, forward, name, section.pack_tokens, inputs.ranks) for part in parts)
    forward.undo()
    return found


def split_over(section: TrainSection, inputs: TrainInputs, step: Step, learned: Trained) -> Alone:
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
