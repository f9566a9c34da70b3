"""A teacher's probabilities and answers."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Rendered
from tunesmith.inference.transformers_engine import TransformersEngine
from tunesmith.models.load import load_model, load_renderer
from tunesmith.models.machine import machine
from tunesmith.models.packed import PackedForward
from tunesmith.models.resolve import ResolvedModel, cache_folder
from tunesmith.progress import bar
from tunesmith.runs import hash_json, write_text


def forward_of(teacher: ResolvedModel, rows: Sequence[Rendered], precision: str = "auto") -> PackedForward:
    """The teacher's packed forward, in evaluation mode and without gradients."""
    model = load_model(teacher, getattr(torch, chosen(precision)), machine().device)
    return PackedForward(model.requires_grad_(False), rows)


def chosen(precision: str) -> str:
    """The precision of a teacher's weights, with what `auto` stands for here."""
    return machine().precision if precision == "auto" else precision


def answers(
    teacher: ResolvedModel, rows: Sequence[Conversation], max_new_tokens: int, precision: str = "auto"
) -> list[str]:
    """The teacher's greedy answers to the rows' prompts, kept on disk for the next time."""
    renderer = load_renderer(teacher)
    prompts = [renderer.prompt(row.prompt, row.tools) for row in rows]
    told = chosen(precision)
    key = hash_json({"model": teacher.identity, "precision": told, "limit": max_new_tokens, "rows": prompts})
    kept = cache_folder() / "distilled" / f"{key[:32]}.json"
    try:
        found: list[str] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        pass
    engine = TransformersEngine(teacher, machine(), precision=told)
    with bar("Teacher's answers", len(rows)) as progress:
        ids = engine.generate(prompts, max_new_tokens, renderer.stop_ids, progress.advance)
    found = [renderer.decode(answer) for answer in ids]
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_text(kept, json.dumps(found, ensure_ascii=False))
    return found
