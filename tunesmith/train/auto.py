"""What `auto` stands for: learning rate, batch size, epochs, rank and length, by rules that are written down here.

Each rule uses nothing but the rows, the model's sizes, the method, the adapter and the optimizer, so the same recipe
and data always resolve alike. docs/control.md has the rules and their sources in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunesmith.models.load import context_length
from tunesmith.models.machine import Machine
from tunesmith.models.resolve import ResolvedModel
from tunesmith.train.objectives.method import Example
from tunesmith.train.section import AUTO, TrainSection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Full fine-tuning's rate at a hidden size of 2000, and how it falls with the size, by family.
BASE_RATE, BASE_SIZE, LEAST_SIZE = 5e-5, 2000, 512  # below that size the fit says nothing
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
ADAPTER = 10.0  # small weights beside a frozen base want a rate ten times as high
USUAL_ALPHA = 32.0  # of the adapter for which that holds
KINDS = {"vera": 10.0}  # as multiples of LoRA's rate
FIXED = {"ia3": 3e-3}
# Preference methods start from a model that already answers, and want small steps.
METHODS = {"dpo": 1 / 40, "kto": 1 / 40, "cpo": 1 / 40, "simpo": 1 / 40, "orpo": 1 / 5}
ROWS_SHARE, LEAST_BATCH, MOST_BATCH = 0.002, 8, 64
USUAL_EPOCHS, LEAST_ROWS_SEEN, MOST_ROWS_SEEN, MOST_EPOCHS = 3, 100, 25_000, 25
ONE_EPOCH = {"text", *METHODS}
USUAL_CONTEXT, LONGEST = 2048, 4096
FEW_TOKENS, MANY_TOKENS = 512, 1024
RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Choice:
    """A value that a rule chose, and why."""

    value: float
    why: str


def with_length(section: TrainSection, model: ResolvedModel) -> tuple[TrainSection, dict[str, Choice]]:
    """The section with a number for its length, which comes first: it decides what the rows are."""
    if section.max_length != AUTO:
        return section, {}
    choice = max_length(context_length(model))
    return section.model_copy(update={"max_length": choice.value}), {"max_length": choice}


def with_pack(section: TrainSection, machine: Machine) -> TrainSection:
    """The section with a number for a pack's tokens. More make products larger, and memory; on a processor float32's
    are as fast with fewer (benchmarks/LOG.md), bfloat16's are not.
    """
    if section.pack_tokens != AUTO:
        return section
    precision = machine.precision if section.precision == AUTO else section.precision
    few = machine.device == "cpu" and precision == "float32"
    return section.model_copy(update={"pack_tokens": FEW_TOKENS if few else MANY_TOKENS})


def max_length(context: int | None) -> Choice:
    """The model's context, up to a length that most machines can train on."""
    length = min(context or USUAL_CONTEXT, LONGEST)
    return Choice(length, f"the model's context is {context or 'not known'}, and {LONGEST:,} is the most that is taken")


def resolve(
    section: TrainSection, examples: Sequence[Example], model: PreTrainedModel
) -> tuple[TrainSection, dict[str, Choice]]:
    """The section with a number in place of every `auto`, and what was chosen by which rule, by recipe key.

    Args:
        examples: what the method made of the training rows.
        model: the base; its weights are not looked at.
    """
    found: dict[str, Choice] = {}
    adapter = section.adapter
    if getattr(adapter, "rank", None) == AUTO:
        found["adapter.rank"] = rank(adapter, sum(s.trained for e in examples for s in e.sequences), model)
        adapter = adapter.model_copy(update={"rank": found["adapter.rank"].value})
    method = section.method.kind
    if section.learning_rate == AUTO:
        found["learning_rate"] = learning_rate(model.config.get_text_config(), adapter, method, section.optimizer)
    if section.batch_size == AUTO:
        found["batch_size"] = batch_size(len(examples))
    if section.epochs == AUTO:
        found["epochs"] = epochs(len(examples), method)
    changed: dict[str, Any] = {key: choice.value for key, choice in found.items() if "." not in key}
    return section.model_copy(update=changed | {"adapter": adapter}), found


def learning_rate(config: Any, adapter: Any, method: str, optimizer: Any) -> Choice:
    """AdamW's rate, times what the optimizer wants beside it. 5e-5 (2000 / hidden size)^p, ten times that for adapters:
    Schulman and Thinking Machines Lab, LoRA Without Regret (2025), with p as fitted there for Llama and Qwen; for other
    families the lower of the two rates.
    """
    rate, why = _adamws_rate(config, adapter, method)
    beside = optimizer.rate_beside_adamw
    if beside != 1:
        rate *= beside
        why.append(f"times {beside:g} for {optimizer.kind}")
    return Choice(float(f"{rate:.2g}"), ", ".join(why))


def _adamws_rate(config: Any, adapter: Any, method: str) -> tuple[float, list[str]]:
    if adapter.kind in FIXED:
        return FIXED[adapter.kind], [f"usual for {adapter.kind}"]
    size, family = max(config.hidden_size, LEAST_SIZE), str(config.model_type).lower()
    fitted = [p for name, p in EXPONENTS.items() if name in family] or list(EXPONENTS.values())
    rate = BASE_RATE * min((BASE_SIZE / size) ** p for p in fitted)
    why = [f"5e-5 at a hidden size of 2000, this model's is {config.hidden_size}"]
    if not adapter.whole_model:
        rate *= ADAPTER * KINDS.get(adapter.kind, 1.0)
        why.append(f"times {ADAPTER * KINDS.get(adapter.kind, 1.0):g} for {adapter.kind}")
        alpha = getattr(adapter, "alpha", USUAL_ALPHA)
        alpha *= math.sqrt(adapter.rank) if getattr(adapter, "rslora", False) else 1.0
        if alpha != USUAL_ALPHA:
            rate *= USUAL_ALPHA / alpha
            why.append(f"times 32 / {alpha:g} for its alpha")
    if method in METHODS:
        rate *= METHODS[method]
        why.append(f"times {METHODS[method]:g} for {method}")
    return rate, why


def batch_size(rows: int) -> Choice:
    """0.2% of the rows (OpenAI's rule for its fine-tuning), as a power of two between 8 and 64."""
    wanted = max(rows * ROWS_SHARE, 1)
    size = min(max(2 ** math.ceil(math.log2(wanted)), LEAST_BATCH), MOST_BATCH)
    return Choice(size, f"0.2% of {rows:,} rows, between {LEAST_BATCH} and {MOST_BATCH}")


def epochs(rows: int, method: str) -> Choice:
    """Three, but at least 100 and at most 25,000 rows seen (OpenAI's cookbook); one for preferences and plain text."""
    if method in ONE_EPOCH:
        return Choice(1, f"usual for {method}")
    if rows * USUAL_EPOCHS < LEAST_ROWS_SEEN:
        count = min(MOST_EPOCHS, LEAST_ROWS_SEEN // rows)
        return Choice(count, f"so that {rows} rows are seen about {LEAST_ROWS_SEEN} times in all")
    if rows * USUAL_EPOCHS > MOST_ROWS_SEEN:
        return Choice(max(1, MOST_ROWS_SEEN // rows), f"so that at most about {MOST_ROWS_SEEN:,} rows are seen")
    return Choice(USUAL_EPOCHS, f"usual for {rows:,} rows")


def rank(adapter: Any, loss_tokens: int, model: PreTrainedModel) -> Choice:
    """The smallest that gives at least as many weights as there are tokens to learn: a weight holds about two bits
    (Allen-Zhu and Li 2024, arXiv:2404.05405), a token of a fine-tune tells about one (LoRA Without Regret).
    """
    layers = adapter.chosen(model)
    each = sum(rows + columns for rows, columns in layers.values())
    smallest = min((min(shape) for shape in layers.values()), default=RANKS[0])
    possible = [r for r in RANKS if r <= smallest] or [smallest]
    chosen = next((r for r in possible if r * each >= loss_tokens), possible[-1])
    return Choice(chosen, f"{chosen * each:,} weights for {loss_tokens:,} tokens that carry loss")


def wanted(section: TrainSection) -> bool:
    """Whether anything but the length is left to a rule."""
    keys = (section.learning_rate, section.batch_size, section.epochs)
    return AUTO in keys or getattr(section.adapter, "rank", None) == AUTO


def told(found: dict[str, Choice]) -> str:
    return "auto: " + "; ".join(f"train.{key} {choice.value:g} ({choice.why})" for key, choice in found.items())
