"""What training a model will take, before it starts: parameters, steps, memory and time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil

from tunesmith.errors import ModelError
from tunesmith.models.machine import Machine
from tunesmith.models.packed import LOGIT_CHUNK
from tunesmith.models.resolve import ResolvedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = {"float32": 4, "bfloat16": 2}
# Of the measured matrix-product rate, the share that a whole training step reaches (benchmarks/RESULTS.md).
STEP_EFFICIENCY = 0.55
STEP_SECONDS = 0.02  # what a step takes besides, however small the model
# Tensors of hidden size and of intermediate size that one decoder layer keeps for backward.
KEPT_HIDDEN, KEPT_INTERMEDIATE = 9, 3
PROCESS = 450 * 2**20  # Python, torch and transformers before any weight


@dataclass(frozen=True)
class Shape:
    """A model's size, read from its configuration without loading weights.

    `linear` maps the name of each linear layer but the output layer to (out, in).
    """

    parameters: int
    head: int
    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds are estimates; `memory` is by part."""

    parameters: int
    trained_parameters: int
    rows: int
    steps: int
    tokens: int
    precision: str
    memory: dict[str, int]
    seconds: float
    available_bytes: int

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes, "fits": self.fits}


def empty_model(model: ResolvedModel) -> PreTrainedModel:
    """The model as its configuration says, without weights.

    Raises:
        ModelError: transformers has no such architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        with torch.device("meta"):
            empty: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
            return empty
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"its configuration can't be used ({str(error).splitlines()[0]})",
            where=str(model.path),
            fix="Check config.json and its model_type.",
        ) from error


def shape_of(empty: PreTrainedModel) -> Shape:
    """A model's sizes."""
    head, linear = empty.get_output_embeddings(), linear_layers(empty)
    text = empty.config.get_text_config()
    widest = max((s for shape in linear.values() for s in shape), default=text.hidden_size)
    return Shape(
        parameters=sum(p.numel() for p in empty.parameters()),
        head=head.weight.numel() if head is not None else 0,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or widest,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        linear=linear,
    )


def linear_layers(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The (out, in) of every linear layer but the output layer, by name."""
    import torch

    head = getattr(model, "score", None) or model.get_output_embeddings()
    return {
        name: (m.weight.shape[0], m.weight.shape[1])
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    }


def estimate(
    shape: Shape,
    machine: Machine,
    precision: str,
    trained: int,
    added: int,
    lengths: list[int],
    shared: int,
    loss_tokens: int,
    steps: int,
    epochs: float,
    batch_size: int,
    pack_tokens: int,
) -> Plan:
    """Memory and time of a run that trains `trained` weights, of which `added` lie beside the base's own.

    Each row has `lengths` tokens, of which all rows share the first `shared`: those are computed once a pack. A
    token costs two floating-point operations a weight forward and two backward, and two more where a weight is
    trained; the output layer only counts where a token carries loss.
    Memory is the frozen weights, the trained ones with gradient and AdamW's two moments, what one pack keeps
    for backward, and one chunk of logits.
    """
    size = BYTES[precision]
    own = [length - shared for length in lengths]
    in_pack = min(max(pack_tokens, max(lengths)), shared + sum(sorted(own)[-batch_size:]))
    products = sum(rows * columns for rows, columns in shape.linear.values())
    tokens = round(sum(lengths) * epochs)
    computed = sum(own) * epochs * (1 + shared / max(in_pack - shared, 1))
    changed = min(trained - added, products)
    work = computed * (4 * products + 6 * added + 2 * changed) + 4 * round(loss_tokens * epochs) * shape.head
    rate = max(machine.gflops.get(precision, 0.0), 1.0) * 1e9
    kept = KEPT_HIDDEN * shape.hidden + KEPT_INTERMEDIATE * shape.intermediate
    return Plan(
        parameters=shape.parameters + added,
        trained_parameters=trained,
        rows=len(lengths),
        steps=steps,
        tokens=tokens,
        precision=precision,
        memory={
            "process": PROCESS,
            "weights": shape.parameters * size,
            "adapter": added * 4,
            "gradients": trained * 4,
            "optimizer": trained * 8,
            "activations": in_pack * kept * shape.layers * size,
            "logits": 2 * min(LOGIT_CHUNK, math.ceil(in_pack)) * shape.vocabulary * 4,
        },
        seconds=round(work / (rate * STEP_EFFICIENCY) + steps * STEP_SECONDS, 1),
        available_bytes=psutil.virtual_memory().available,
    )
