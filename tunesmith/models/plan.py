"""What training a model will take, before it starts: parameters, steps, memory and time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil

from tunesmith.errors import ModelError
from tunesmith.models.attention import LONGEST_KEPT
from tunesmith.models.head import tokens_at_once
from tunesmith.models.load import silence
from tunesmith.models.machine import Machine
from tunesmith.models.quantise import FORMATS, parameter_count
from tunesmith.models.resolve import ResolvedModel
from tunesmith.models.words import grow

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES = {"float32": 4, "bfloat16": 2}
# What a step does besides products, in units of the time that its products take in float32. It hardly gets faster with
# them: steps in bfloat16 took 0.6 of those in float32 where products took an eighth to a third (benchmarks/LOG.md).
BESIDES = 1.0
ATTENTION = 18  # operations a query, key and channel of every layer, at float32's rate (benchmarks/growth.py)
STEP_SECONDS = 0.02  # what a step takes besides, however small the model
# Tensors of hidden size and of intermediate size that one decoder layer keeps for backward.
KEPT_HIDDEN, KEPT_INTERMEDIATE = 9, 3
# What a step has in memory by what its layers keep: the backward pass's own, and holes that its buffers leave on the
# heap. Rows that are too long to be computed together take more. Measured, as the next three (benchmarks/plan.py).
BY_KEPT, BY_KEPT_LONG = 1.5, 2.3
LOGITS = 3.5  # times the logits that are there at once: their softmax, their gradient
GRADIENTS = 8  # bytes of a weight that computes rounded: its own gradient, the sum in float32, and holes
PROCESS = 510 * 2**20  # Python, torch and transformers before any weight, and what they load at first use
LORA_RANK = 16  # of the adapter that is advised instead of training every weight


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
class Job:
    """What is to be trained, on what, as far as its cost depends on it.

    Attributes:
        precision: of the frozen weights and of what is kept for backward.
        trained: weights that are trained, of which `added` lie beside the base's own.
        lengths: tokens of each row; all rows share the first `shared`, which are computed once a pack.
        loss_tokens: tokens of all rows that carry loss.
        state_bytes: what the optimizer keeps of each trained weight.
        kept_bytes: what terms against forgetting keep of each trained weight.
        activations: whether those of decoder layers are kept, computed again, or offloaded.
        reached: decoder layers that gradients go through, the last ones; below them nothing is kept. None: all.
        quantise: the format of the frozen linear layers, if they are in fewer bits than `precision`.
    """

    shape: Shape
    precision: str
    trained: int
    added: int
    lengths: list[int]
    shared: int
    loss_tokens: int
    steps: int
    epochs: float
    batch_size: int
    pack_tokens: int
    state_bytes: float = 8.0
    kept_bytes: float = 0.0
    activations: str = "keep"
    reached: int | None = None
    quantise: str | None = None


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds are estimates; `memory` is by part.

    Attributes:
        flops: floating-point operations of all its matrix products.
        changes: where it does not fit, what would make it fit, the cheapest first.
    """

    parameters: int
    trained_parameters: int
    rows: int
    steps: int
    tokens: int
    precision: str
    memory: dict[str, int]
    flops: float
    seconds: float
    available_bytes: int
    changes: list[Change]

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.available_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"peak_bytes": self.peak_bytes, "fits": self.fits}


@dataclass(frozen=True)
class Change:
    """A setting that would lower the peak.

    Attributes:
        settings: recipe keys and their values, as `--set` takes them.
        costs: what is given up.
        peak_bytes: the estimated peak with it.
        fits: whether that is within the memory there is.
    """

    settings: dict[str, Any]
    costs: str
    peak_bytes: int
    fits: bool

    def __str__(self) -> str:
        said = " ".join(f"--set {key}={value}" for key, value in self.settings.items())
        return f"{said} ({self.costs}): about {self.peak_bytes / 2**30:.1f} GiB"


def empty_model(model: ResolvedModel) -> PreTrainedModel:
    """The model as its configuration says, without weights.

    Raises:
        ModelError: transformers has no such architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    silence()
    try:
        config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
        with torch.device("meta"):
            empty: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        grow(empty, model)
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
        parameters=parameter_count(empty),
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
        name: (m.out_features, m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and m is not head
    }


def estimate(job: Job, machine: Machine, available: int | None = None) -> Plan:
    """Memory and time of a job that may take `available` bytes (if None: what is free, and what this process has).

    A token costs two floating-point operations a weight forward, two backward in the layers that gradients go through,
    and two more where a weight is trained; the output layer only counts where a token carries loss.
    Memory is the weights, float32 masters of those that are trained rounded, gradients, the optimizer's state, what
    terms against forgetting keep, what one pack keeps for backward (one layer's and the inputs of all, if activations
    are computed again), and one chunk of logits.
    """
    free = free_memory() if available is None else available
    shape = job.shape
    own = [length - job.shared for length in job.lengths]
    products = sum(rows * columns for rows, columns in shape.linear.values())
    tokens = round(sum(job.lengths) * job.epochs)
    computed = sum(own) * job.epochs * (1 + job.shared / max(_in_pack(job) - job.shared, 1))
    changed = min(job.trained - job.added, products)
    back = _reached(job) / max(shape.layers, 1)
    work = computed * ((2 + 2 * back) * products + 6 * job.added + 2 * changed)
    work += 4 * round(job.loss_tokens * job.epochs) * shape.head
    looked = sum(n * n for n in job.lengths) / 2 * job.epochs * shape.hidden * shape.layers * (1 + 2 * back) / 3
    rate, plain = (max(machine.gflops.get(name, 0.0), 1.0) * 1e9 for name in (job.precision, "float32"))
    memory = peak_memory(job)
    return Plan(
        parameters=shape.parameters + job.added,
        trained_parameters=job.trained,
        rows=len(job.lengths),
        steps=job.steps,
        tokens=tokens,
        precision=job.precision,
        memory=memory,
        flops=float(work),
        seconds=round(work / rate + (BESIDES * work + ATTENTION * looked) / plain + job.steps * STEP_SECONDS, 1),
        available_bytes=free,
        changes=[] if sum(memory.values()) <= free else advise(job, free),
    )


def free_memory() -> int:
    """Bytes that this process has or could have."""
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def peak_memory(job: Job) -> dict[str, int]:
    """Bytes at the peak of a training step, by part."""
    shape, size, in_pack = job.shape, BYTES[job.precision], _in_pack(job)
    layer = KEPT_HIDDEN * shape.hidden + KEPT_INTERMEDIATE * shape.intermediate
    layers = max(_reached(job), 1)  # whatever is trained, a layer's own are there while it is computed
    inputs = shape.hidden * layers if job.activations == "recompute" else 0
    masters = 4 * (job.trained - job.added) if job.precision != "float32" else 0
    kept = round(job.trained * job.kept_bytes)
    by_kept = BY_KEPT if max(job.lengths) <= LONGEST_KEPT else BY_KEPT_LONG
    return {
        "process": PROCESS,
        "weights": _held(shape, size, job.quantise),
        "adapter": job.added * 4,
        "gradients": GRADIENTS * (job.trained - job.added) + job.added * 4 if masters else job.trained * 4,
        "optimizer": round(job.trained * job.state_bytes),
        **({"masters": masters} if masters else {}),
        **({"start": kept} if kept else {}),
        "activations": round(
            in_pack * size * (layer * layers if job.activations == "keep" else inputs + layer) * by_kept
        ),
        "logits": round(LOGITS * min(tokens_at_once(shape.vocabulary), in_pack) * shape.vocabulary * 4),
    }


def _reached(job: Job) -> int:
    return job.shape.layers if job.reached is None else job.reached


def _in_pack(job: Job) -> int:
    """Tokens in the largest pack."""
    own = sorted(length - job.shared for length in job.lengths)
    return min(max(job.pack_tokens, max(job.lengths)), job.shared + sum(own[-job.batch_size :]))


def advise(job: Job, available: int) -> list[Change]:
    """What lowers a job's peak, the cheapest first: each change by itself, and last all of them together.

    Only changes that lower the estimate are listed. What costs nothing in the result comes first, what gives up
    precision next, what trains fewer weights or on less after that.
    """
    longest = max(job.lengths)
    steps: list[tuple[dict[str, Any], str, dict[str, Any]]] = []
    if _in_pack(job) > longest:
        fitting = [n for n in _halves(job.pack_tokens, longest) if _peak(job, pack_tokens=n) <= available]
        pack = fitting[0] if fitting else longest
        steps.append(({"train.pack_tokens": pack}, "the result stays the same", {"pack_tokens": pack}))
    if job.activations == "keep":
        again = {"train.speed.activations": "recompute"}
        steps.append((again, "the result stays the same; a third more time", {"activations": "recompute"}))
    if job.precision == "float32" and job.added:
        steps.append(({"train.precision": "bfloat16"}, "the frozen base is rounded", {"precision": "bfloat16"}))
    if job.state_bytes > 4 and job.trained > 10**7:
        steps.append(({"train.optimizer": "adafactor"}, "other steps than adamw's", {"state_bytes": 0.1}))
    if not job.added:
        added = sum(LORA_RANK * (rows + columns) for rows, columns in job.shape.linear.values())
        change = {"trained": added, "added": added, "precision": "bfloat16", "state_bytes": 8.0, "reached": None}
        steps.append(({"train.adapter": "lora"}, "small weights beside the frozen base are trained", change))
    shorter = sorted(job.lengths)[int(0.9 * (len(job.lengths) - 1))]
    if shorter < longest:
        settings = {"train.max_length": shorter, "data.over_length": "drop"}
        kept = [length for length in job.lengths if length <= shorter]
        pack = min(job.pack_tokens, max(shorter, job.shared + 1))
        costs = f"the longest {len(job.lengths) - len(kept)} rows are left out"
        steps.append((settings | {"train.pack_tokens": pack}, costs, {"lengths": kept, "pack_tokens": pack}))
    if len(steps) > 1:
        # A later change of the same field stands: the whole list is a job that could be run.
        settings = {k: v for s, _, _ in steps for k, v in s.items()}
        if settings.get("train.adapter") == "lora":
            settings.pop("train.optimizer", None)
        steps.append((settings, "all of these", {k: v for _, _, c in steps for k, v in c.items()}))
    peaks = [_peak(job, **change) for _, _, change in steps]
    return [
        Change(settings, costs, peak, peak <= available)
        for (settings, costs, _), peak in zip(steps, peaks, strict=True)
        if peak < _peak(job)
    ]


def told(changes: list[Change]) -> str:
    """The changes as advice: those that are enough by themselves, or all and that a smaller model is needed."""
    enough = [str(change) for change in changes if change.fits]
    if enough:
        return "Cheapest change first: " + "; or ".join(enough) + "."
    tried = "; ".join(map(str, changes))
    return (f"Not enough by themselves: {tried}. " if tried else "") + "Take a smaller base model, or a larger machine."


def _peak(job: Job, **change: Any) -> int:
    return sum(peak_memory(replace(job, **change)).values())


def _halves(start: int, end: int) -> list[int]:
    """`start` halved again and again, down to `end`."""
    found = []
    while start // 2 > end:
        start //= 2
        found.append(start)
    return [*found, end]


def _held(shape: Shape, size: int, quantise: str | None) -> int:
    """Bytes of the base's weights: quantised ones in their bits, and the largest of them once as a whole matrix."""
    if quantise is None:
        return shape.parameters * size
    packed = [rows * columns for rows, columns in shape.linear.values()]
    bits = FORMATS[quantise].bits
    return round(sum(packed) * bits / 8) + (shape.parameters - sum(packed) + max(packed, default=0)) * size
