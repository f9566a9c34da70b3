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
from tunesmith.models.matrices import picked, products, shapes
from tunesmith.models.quantise import FORMATS, parameter_count, quantisable
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
KEPT_HIDDEN = 9  # tensors of hidden size that one decoder layer keeps for backward, beside those inside its MLP
# What a step has in memory by what its layers keep: the backward pass's own, and holes that its buffers leave on the
# heap. Rows that are too long to be computed together take more. Measured, as the next three (benchmarks/plan.py).
BY_KEPT, BY_KEPT_LONG = 1.5, 2.3
LOGITS = 3.5  # times the logits that are there at once: their softmax, their gradient
GRADIENTS = 8  # bytes of a weight that computes rounded: its own gradient, the sum in float32, and holes
PROCESS = 510 * 2**20  # Python, torch and transformers before any weight, and what they load at first use
EIGHT_BIT = 2 + 8 / 256  # bytes that AdamW in 8 bits keeps of a weight
LORA_RANK = 16  # of the adapter that is advised instead of training every weight


@dataclass(frozen=True)
class Shape:
    """A model's size, read from its configuration without loading weights.

    Attributes:
        head: weights of the output layer.
        inner: numbers that a layer's MLP keeps of a token for backward: what each of its products gives or takes beside
            the hidden state (gated: three times the inner width; without a gate: twice) and what experts take and give.
        linear: the (out, in) of each linear layer but the output layer, by name.
        products: weights that a token is multiplied with before the output layer.
        quantisable: whether most of its weights could lie in few bits.
    """

    parameters: int
    head: int
    hidden: int
    inner: int
    layers: int
    vocabulary: int
    linear: dict[str, tuple[int, int]]
    products: int
    quantisable: bool = True


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
        at_once: of the weights, the most that are trained in one step. None: all.
        usual: where they are trained in turns, the means over all steps of `at_once` and `reached`.
        quantise: the format of the frozen linear layers, if they are in fewer bits than `precision`.
        replayed: rows that are trained on besides, thought to be like the others.
        read: tokens that are only read, in the whole training: before it, or beside the rows; `read_loss` carry loss.
        teacher: a second model that reads every row, its weights in `teacher_precision`.
        device: where it is trained.
        format: in which the frozen linear layers could lie, if they don't.
        eight_bit: whether the optimizer's moments could lie in 8 bits.
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
    at_once: int | None = None
    usual: tuple[float, float] | None = None
    quantise: str | None = None
    replayed: int = 0
    read: int = 0
    read_loss: int = 0
    teacher: Shape | None = None
    teacher_precision: str = "float32"
    device: str = "cpu"
    format: str | None = None
    eight_bit: bool = False


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
    head, text, found = empty.get_output_embeddings(), empty.config.get_text_config(), products(empty)
    # Each matrix of an MLP has one side of the hidden size, and its other side is what is kept.
    inside = sum(count for name, count in found.items() if "attn" not in name and "attention" not in name)
    return Shape(
        parameters=parameter_count(empty),
        head=head.weight.numel() if head is not None else 0,
        hidden=text.hidden_size,
        inner=inside // text.hidden_size // text.num_hidden_layers + 2 * picked(empty) * text.hidden_size,
        layers=text.num_hidden_layers,
        vocabulary=text.vocab_size,
        linear=shapes(empty),
        products=sum(found.values()),
        quantisable=bool(quantisable(empty)),
    )


def estimate(job: Job, machine: Machine, available: int | None = None) -> Plan:
    """Memory and time of a job that may take `available` bytes (if None: what is free, and what this process has).

    A token costs two floating-point operations a weight forward, two backward in the layers that gradients go through,
    and two more where a weight is trained; the output layer only counts where a token carries loss. What is only read
    (by a reference, a teacher) costs the first two.
    Memory is the weights, float32 masters of those that are trained rounded, gradients, the optimizer's state, what
    terms against forgetting keep, what one pack keeps for backward (one layer's and the inputs of all, if activations
    are computed again), and one chunk of logits.
    """
    free = free_memory(job.device) if available is None else available
    shape = job.shape
    own = [length - job.shared for length in job.lengths]
    tokens = round(sum(job.lengths) * job.epochs)
    passes = job.epochs + job.replayed / len(job.lengths)
    computed = sum(own) * passes * (1 + job.shared / max(_in_pack(job) - job.shared, 1))
    trained, reached = job.usual or (_at_once(job), _reached(job))
    changed = min(trained - job.added, shape.products)
    back = reached / max(shape.layers, 1)
    work = computed * ((2 + 2 * back) * shape.products + 6 * job.added + 2 * changed)
    work += 4 * round(job.loss_tokens * passes) * shape.head
    work += 2 * (job.read * shape.products + job.read_loss * shape.head)
    if job.teacher:
        share = job.epochs / passes
        work += 2 * (computed * share * job.teacher.products + job.loss_tokens * job.epochs * job.teacher.head)
    looked = sum(n * n for n in job.lengths) / 2 * passes * shape.hidden * shape.layers * (1 + 2 * back) / 3
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


def free_memory(device: str) -> int:
    """Bytes that this process has or could have: of the accelerator's memory, where it trains on one."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def peak_memory(job: Job) -> dict[str, int]:
    """Bytes at the peak of a training step, by part."""
    shape, size, in_pack = job.shape, BYTES[job.precision], _in_pack(job)
    layer = KEPT_HIDDEN * shape.hidden + shape.inner
    layers = max(_reached(job), 1)  # whatever is trained, a layer's own are there while it is computed
    inputs = shape.hidden * layers if job.activations == "recompute" else 0
    masters = 4 * (job.trained - job.added) if job.precision != "float32" else 0
    kept, at_once = round(job.trained * job.kept_bytes), _at_once(job)
    by_kept = BY_KEPT if max(job.lengths) <= LONGEST_KEPT else BY_KEPT_LONG
    return {
        **({"process": PROCESS} if job.device == "cpu" else {}),
        "weights": _held(shape, size, job.quantise),
        **({"teacher": job.teacher.parameters * BYTES[job.teacher_precision]} if job.teacher else {}),
        "adapter": job.added * 4,
        "gradients": GRADIENTS * (at_once - job.added) + job.added * 4 if masters else at_once * 4,
        "optimizer": round(at_once * job.state_bytes),
        **({"masters": masters} if masters else {}),
        **({"start": kept} if kept else {}),
        "activations": round(
            in_pack * size * (layer * layers if job.activations == "keep" else inputs + layer) * by_kept
        ),
        "logits": round(LOGITS * min(tokens_at_once(shape.vocabulary), in_pack) * shape.vocabulary * 4),
    }


def _reached(job: Job) -> int:
    return job.shape.layers if job.reached is None else job.reached


def _at_once(job: Job) -> int:
    return job.trained if job.at_once is None else job.at_once


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
    if job.eight_bit and _at_once(job) > 10**7:
        costs = "the optimizer's moments are rounded to 8 bits"
        steps.append(({"train.optimizer": "adamw_8bit"}, costs, {"state_bytes": EIGHT_BIT}))
    frozen: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    if not job.added:
        added = sum(LORA_RANK * (rows + columns) for rows, columns in job.shape.linear.values())
        frozen = {"trained": added, "added": added, "state_bytes": 8.0, "reached": None, "at_once": None, "usual": None}
        beside = {"train.adapter": "lora"}
        costs = "small weights beside the frozen base are trained, which want ten times the rate"
        steps.append((beside, costs, frozen))
    if job.format and not job.quantise:
        costs = f"the frozen base is rounded to {job.format}, and made whole for each product"
        steps.append((beside | {"train.quantise": job.format}, costs, frozen | {"quantise": job.format}))
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
