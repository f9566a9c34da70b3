"""The evaluation stage: both models answer the same held-out rows, and the scorecard says what that proves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith import plugins
from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.errors import DataError
from tunesmith.evaluate.metrics import FITTING, Answers, Metric
from tunesmith.evaluate.section import EvaluateSection
from tunesmith.evaluate.statistics import Resamples, difference, interval, verdict
from tunesmith.inference.engine import Engine
from tunesmith.progress import bar
from tunesmith.runs import json_line, write_json

SIDES = ("baseline", "tuned")


@dataclass(frozen=True)
class EvaluateInputs:
    """Test rows, what their answers are, and the two models (made when their turn comes, one at a time)."""

    rows: Sequence[Conversation]
    kind: str
    goal: str | None
    renderer: Renderer
    engines: dict[str, Callable[[], Engine]]
    seed: int


def evaluate(section: EvaluateSection, inputs: EvaluateInputs, target: Path) -> dict[str, Any]:
    """Write scorecard.json and answers.jsonl into `target`; returns the scorecard.

    Raises:
        DataError: there is no test row.
    """
    rows = drawn(inputs.rows, section.rows, inputs.seed)
    if not rows:
        raise DataError("no test rows to evaluate on", where="data.split.test", fix="Hold some out: test: 0.1")
    goal, metrics = chosen(section, inputs)
    references = [row.answer for row in rows]
    longest = max(len(inputs.renderer.tokenizer(r, add_special_tokens=False)["input_ids"]) for r in references)
    limit = section.max_new_tokens or longest + longest // 4 + 8
    sides = {side: _answers(inputs.engines[side], rows, inputs.renderer, limit, side) for side in SIDES}

    draws = Resamples(len(rows), section.bootstrap, inputs.seed)
    scores: dict[str, Any] = {}
    for metric in metrics:
        stats = {side: metric.stats(answers) for side, answers in sides.items()}
        scores[metric.name] = {
            **{side: interval(metric, stats[side], draws) for side in SIDES},
            "difference": difference(metric, stats["baseline"], stats["tuned"], draws),
            "n": len(rows),
            "higher_is_better": metric.higher_is_better,
        }
    decider = next(m for m in metrics if m.name == goal)
    scorecard = {
        "verdict": verdict(decider, scores[goal]["difference"]),
        "goal_metric": goal,
        "n": len(rows),
        "answers": inputs.kind,
        "max_new_tokens": limit,
        "metrics": scores,
    }
    write_json(target / "scorecard.json", scorecard)
    by_row = {side: decider.stats(answers) for side, answers in sides.items()}
    lines = []
    for i, row in enumerate(rows):
        line: dict[str, Any] = {
            "id": row.id,
            "prompt": [m.for_template() for m in row.prompt],
            "reference": row.answer,
        }
        for side, answers in sides.items():
            value = float(decider.value(by_row[side][i])) if decider.name != "macro_f1" else None
            line[side] = {
                "answer": answers.given[i],
                "score": value,
                "nll": answers.nll[i],
                "tokens": answers.tokens[i],
            }
        lines.append(json_line(line))
    (target / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    return scorecard


def drawn(rows: Sequence[Conversation], count: int | None, seed: int) -> list[Conversation]:
    """`count` of the rows by seed, in their order (a file's first rows are often all of one kind)."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), count, replace=False))]


def chosen(section: EvaluateSection, inputs: EvaluateInputs) -> tuple[str, list[Metric]]:
    """The goal's metric and all that are taken, the goal's first."""
    fitting = section.metrics or list(FITTING[inputs.kind])
    goal = inputs.goal or fitting[0]
    names = dict.fromkeys([goal, *fitting])
    return goal, [plugins.load("metric", name) for name in names]


def _answers(
    make: Callable[[], Engine], rows: Sequence[Conversation], renderer: Renderer, limit: int, side: str
) -> Answers:
    engine = make()
    prompts = [renderer.prompt(row.prompt) for row in rows]
    with bar(f"Answers, {side}", len(rows)) as progress:
        given = engine.generate(prompts, limit, renderer.stop_ids, progress.advance)
    with bar(f"Likelihood, {side}", len(rows)) as progress:
        scores = engine.score([renderer.render(row, only_last=True) for row in rows], progress.advance)
    return Answers(
        [renderer.decode(ids) for ids in given],
        [row.answer for row in rows],
        [s.nll for s in scores],
        [s.tokens for s in scores],
    )
