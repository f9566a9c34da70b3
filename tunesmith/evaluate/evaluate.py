"""The evaluation stage: both models answer the same held-out rows, and the scorecard says what that proves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith import plugins
from tunesmith.conversation.message import Conversation, Text
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate import probes
from tunesmith.evaluate.conditions import Condition, decide
from tunesmith.evaluate.files import json_in, local_file
from tunesmith.evaluate.junit import junit
from tunesmith.evaluate.metrics import FITTING, Answers, Floats, Metric
from tunesmith.evaluate.metrics.custom import custom
from tunesmith.evaluate.mistakes import mistakes
from tunesmith.evaluate.people import reviewed
from tunesmith.evaluate.section import EvaluateSection, GateSection
from tunesmith.evaluate.sides import Side, answered, embedded
from tunesmith.evaluate.slices import by_task, slices
from tunesmith.evaluate.statistics import compared, holm, verdict
from tunesmith.inference.kept import Kept
from tunesmith.runs import json_line, write_json, write_text

SIDES = ("baseline", "tuned")


@dataclass(frozen=True)
class EvaluateInputs:
    """Test rows, what their answers are, and the two models (each opened when its turn comes).

    `folder` is what the recipe's paths are relative to; `train` and `validation` are the rows that the tuned model
    was trained on and watched with, where it is known. `judge` is the model that the section's judge names,
    `review` the folder where people's judgements of earlier answers lie, which hold where the answers are the same.
    """

    rows: Sequence[Conversation]
    kind: str
    goal: str | None
    subjects: dict[str, Kept]
    seed: int
    folder: Path = Path()
    gate: GateSection | None = None
    train: Sequence[Conversation] = field(default=())
    validation: Sequence[Conversation] = field(default=())
    judge: Kept | None = None
    review: Path | None = None


def evaluate(section: EvaluateSection, inputs: EvaluateInputs, target: Path) -> dict[str, Any]:
    """Write scorecard.json and answers.jsonl into `target`; returns the scorecard.

    Raises:
        DataError: there is no test row.
        RecipeError: a metric needs what a model does not give.
    """
    rows = _rows(section, inputs)
    goal, metrics = chosen(section, inputs)
    limit = section.max_new_tokens or _limit(rows, inputs.subjects["baseline"])
    asked = probes.asked(section, inputs, rows, limit)
    metrics = _measurable(metrics, inputs)

    sides, shown, embedding = _both(section, inputs, rows, metrics, limit, asked)
    stats = {m.name: {side: m.measure(sides[side].answers) for side in SIDES} for m in metrics}
    card = _scored(section, inputs, rows, metrics, limit, sides, stats)
    card |= _probed(asked, shown, target)
    lines = _lines(rows, sides, metrics[0], stats[goal])
    if inputs.review and (told := reviewed(inputs.review, lines, target / "judge.jsonl")):
        card["review"] = told
    card["errors"] = mistakes(lines, inputs.kind, metrics[0].higher_is_better, inputs.seed, embedding)
    card["gate"] = decide(inputs.gate.conditions if inputs.gate else None, card, inputs.gate is not None)

    write_json(target / "scorecard.json", card)
    write_text(target / "junit.xml", junit(inputs.subjects["tuned"].name, card))
    write_text(target / "answers.jsonl", "".join(map(json_line, lines)))
    return card


def _rows(section: EvaluateSection, inputs: EvaluateInputs) -> list[Conversation]:
    """The rows that are asked, each with the schema that its answer is to follow, where there is one."""
    rows = drawn(inputs.rows, section.rows, inputs.seed)
    if not rows:
        raise DataError("no test rows to evaluate on", where="data.split.test", fix="Hold some out: test: 0.1")
    if not section.json_schema:
        return rows
    shared = {"schema": json_in(local_file(section.json_schema, inputs.folder))}
    return [replace(row, metadata=shared | row.metadata) for row in rows]


def _measurable(metrics: list[Metric], inputs: EvaluateInputs) -> list[Metric]:
    """Those of the metrics that both models give what is needed for; the goal's, which is first, must be."""
    goal = metrics[0].name
    if not all(subject.scores for subject in inputs.subjects.values()):
        metrics = [m for m in metrics if not m.likelihood]
    if goal not in [m.name for m in metrics]:
        raise RecipeError(
            f"the goal {goal} needs likelihoods, which an endpoint does not give",
            where="goal.metric",
            fix="Choose another: accuracy, exact_match, rouge_l, ...",
        )
    return metrics


def _both(
    section: EvaluateSection,
    inputs: EvaluateInputs,
    rows: Sequence[Conversation],
    metrics: Sequence[Metric],
    limit: int,
    asked: Sequence[probes.Probe],
) -> tuple[dict[str, Side], dict[str, dict[str, Any]], tuple[str, Any] | None]:
    """What each model answers, what it shows each probe, and what the rows are about by the first that embeds them.

    Each is closed before the next is opened.
    """
    sides: dict[str, Side] = {}
    embedding: tuple[str, Any] | None = None
    shown: dict[str, dict[str, Any]] = {probe.name: {} for probe in asked}
    for side in SIDES:
        subject = inputs.subjects[side]
        sides[side] = answered(section, subject, rows, metrics, limit, side, inputs.seed, inputs.kind)
        embedding = embedding or embedded(subject, rows)
        for probe in asked:
            shown[probe.name][side] = probe.ask(subject, side, shown[probe.name].get("baseline"))
        subject.close()
    return sides, shown, embedding


def _scored(
    section: EvaluateSection,
    inputs: EvaluateInputs,
    rows: Sequence[Conversation],
    metrics: Sequence[Metric],
    limit: int,
    sides: dict[str, Side],
    stats: dict[str, dict[str, Floats]],
) -> dict[str, Any]:
    """The scorecard as far as the answers to the test rows make it."""
    decider = metrics[0]
    scores = {
        m.name: compared(m, stats[m.name], section.bootstrap, inputs.seed)
        | ({"details": {s: m.details(sides[s].answers) for s in SIDES}} if m.details else {})
        for m in metrics
    }
    holm(scores)
    card: dict[str, Any] = {
        "verdict": verdict(decider, scores[decider.name]["difference"]),
        "goal_metric": decider.name,
        "n": len(rows),
        "answers": inputs.kind,
        "max_new_tokens": limit,
        "models": {side: inputs.subjects[side].name for side in SIDES},
        "rounds": {"seeds": section.seeds, "temperature": section.heat},
        "metrics": scores,
        "failures": {side: dict(inputs.subjects[side].failures) for side in SIDES},
        "tasks": by_task(rows, metrics, stats, inputs.seed),
        "slices": slices(rows, inputs.kind, decider, stats[decider.name], inputs.seed),
    }
    if inputs.kind == "label" and not (decider.likelihood or decider.chooses):
        tuned = stats[decider.name]["tuned"]
        card["constant"] = _constant(decider, sides["tuned"].answers, tuned, section, inputs.seed)
    return card


def _probed(asked: Sequence[probes.Probe], shown: dict[str, dict[str, Any]], target: Path) -> dict[str, Any]:
    """What the probes add to the scorecard; what was asked and answered for one is written, a line each."""
    found: dict[str, Any] = {}
    for probe in asked:
        for name, told in probe.compare(shown[probe.name]).items():
            examples = told.pop("examples", [])
            found[name] = told
            if examples:
                write_text(target / f"{name}.jsonl", "".join(map(json_line, examples)))
    return found


def _constant(decider: Metric, answers: Answers, tuned: Floats, section: EvaluateSection, seed: int) -> dict[str, Any]:
    """The tuned model's score against that of giving the commonest label always: a model that does no better has
    learnt nothing of the rows."""
    label = Counter(answers.references).most_common(1)[0][0]
    always = [label] * len(answers.references)
    given = decider.measure(replace(answers, given=always, samples=[always] * len(answers.samples)))
    score = compared(decider, {"baseline": given, "tuned": tuned}, section.bootstrap, seed)
    return {"label": label, decider.name: score}


def drawn(rows: Sequence[Conversation], count: int | None, seed: int) -> list[Conversation]:
    """`count` of the rows by seed, in their order (a file's first rows are often all of one kind)."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(np.random.default_rng(seed).choice(len(rows), count, replace=False))]


def chosen(section: EvaluateSection, inputs: EvaluateInputs) -> tuple[str, list[Metric]]:
    """The goal's metric and all that are taken, the goal's first; those that the gate names are among them.

    Raises:
        RecipeError: two of them have one name.
    """
    fitting = section.metrics or list(FITTING[inputs.kind])
    gated = [Condition.read(text).path[0] for text in (inputs.gate and inputs.gate.conditions) or ()]
    fitting = [*fitting, *(["schema_valid"] if section.json_schema else [])]
    names = dict.fromkeys([inputs.goal or fitting[0], *fitting])
    found = [metric_named(name, inputs.folder) for name in names]
    taken = [metric.name for metric in found]
    twice = next((name for name in taken if taken.count(name) > 1), None)
    if twice is not None:
        raise RecipeError(f"two metrics are called '{twice}'", where="evaluate.metrics", fix="Rename your function.")
    more = [name for name in dict.fromkeys(gated) if name in plugins.known("metric") and name not in taken]
    return found[0].name, [*found, *(metric_named(name, inputs.folder) for name in more)]


def metric_named(name: str, folder: Path) -> Metric:
    """A built-in metric, a plugin's, or a user's function."""
    metric: Metric = custom(name, folder) if ":" in name else plugins.load("metric", name)
    return metric


def _limit(rows: Sequence[Conversation], subject: Kept) -> int:
    longest = max(subject.length(row.answer) for row in rows)
    return longest + longest // 4 + 8


def _lines(
    rows: Sequence[Conversation], sides: dict[str, Side], decider: Metric, stats: dict[str, Any]
) -> list[dict[str, Any]]:
    """What each row asked, and what both models answered."""
    by_row = {
        side: decider.row(stats[side]) if decider.name not in ("macro_f1",) else [None] * len(rows) for side in SIDES
    }
    lines = []
    for i, row in enumerate(rows):
        line: dict[str, Any] = {
            "id": row.id,
            "prompt": [m.for_template() for m in row.prompt],
            "reference": row.text if isinstance(row, Text) else row.answer,
        } | ({"metadata": row.metadata} if row.metadata else {})
        for side, told in sides.items():
            reply = told.replies[i]
            line[side] = {
                "answer": reply[0].text,
                "score": by_row[side][i],
                "nll": told.answers.nll[i] if np.isfinite(told.answers.nll[i]) else None,
                "tokens": told.answers.tokens[i],
            }
            if len(reply) > 1:
                line[side]["samples"] = [r.text for r in reply]
            if any(r.failure for r in reply):
                line[side]["failure"] = next(r.failure for r in reply if r.failure)
        lines.append(line)
    return lines
