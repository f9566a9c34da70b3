"""Training without Tunesmith's loop: rows one at a time, PEFT's own forward, transformers' own loss, torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.conversation.render import Rendered
from tunesmith.train.batching import Schedule, learning_rate


@dataclass
class Plain:
    """A plain training's end: the model with its adapter, and each step's loss and gradient norm."""

    model: Any
    losses: list[float]
    norms: list[float]


def nll(model: Any, ids: list[int], labels: list[int]) -> Tensor:
    """The sum over a row's labelled tokens of -log p, in nats, as the model itself tells their mean."""
    given = torch.tensor([ids])
    out = model(input_ids=given, attention_mask=torch.ones_like(given), labels=torch.tensor([labels]))
    found: Tensor = out.loss * sum(label >= 0 for label in labels)
    return found


def labels(row: Rendered) -> list[int]:
    """A row's tokens where they carry loss, -100 elsewhere."""
    return [i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)]


def train(
    folder: Path,
    config: Any,
    rows: Sequence[dict[str, Any]],
    *,
    steps: int,
    batch_size: int,
    epochs: int,
    rate: float,
    after_step: Callable[[Any, int], Any] = lambda model, step: None,
) -> Plain:
    """Train PEFT's `config` on the model in `folder`, on the last answers of rows; seed 7.

    Args:
        after_step: is given the model and the step's number, from 1, once its weights have moved.
    """
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(7)
    model = get_peft_model(model, config)
    weights = [p for name, p in model.named_parameters() if p.requires_grad and ".ranknum" not in name]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    schedule, done = Schedule.of(len(rows), batch_size, epochs, steps, 7), Plain(model, [], [])
    for step in range(steps):
        losses, tokens = [], 0
        for i in schedule.step(step):
            messages = rows[i]["messages"]
            prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
            before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            after = tokenizer(messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
            losses.append(nll(model, before + after, [-100] * len(before) + after))
            tokens += len(after)
        loss = torch.stack(losses).sum() / tokens
        loss.backward()
        done.losses.append(loss.item())
        done.norms.append(torch.nn.utils.clip_grad_norm_(weights, 1.0).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, rate, 0.05, "cosine")
        optimizer.step()
        after_step(model, step + 1)
        optimizer.zero_grad()
    return done
