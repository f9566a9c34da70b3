"""The evaluation stage: both models answer the same held-out rows, and the scorecard says what that proves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith import plugins
from tunesmith.conversation.message import Conversation, Message, Preference, Text
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate import probes
from tunesmith.evaluate.conditions import Condition, decide
from tunesmith.evaluate.files import json_in, local_file
from tunesmith.evaluate.junit import junit
from tunesmith.evaluate.metrics import FITTING, Answers, Floats, Metric
from tunesmith.evaluate.metrics.custom import custom
from tunesmith.evaluate.mistakes import FEWEST_ROWS, about, mistakes
from tunesmith.evaluate.people import reviewed
from tunesmith.evaluate.section import EvaluateSection, GateSection
from tunesmith.evaluate.slices import by_task, slices
from tunesmith.evaluate.statistics import compared, holm, verdict
from tunesmith.inference.engine import Sampling
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask, Reply
from tunesmith.progress import bar
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


@dataclass(frozen=True)
class Side:
    """One model's answers, and each row's replies over all rounds."""

    answers: Answers
    replies: list[list[Reply]]


def evaluate(section: EvaluateSection, inputs: EvaluateInputs, target: Path) -> dict[str, Any]:
    """Write scorecard.json and answers.jsonl into `target`; returns the scorecard.

    Raises:
        DataError: there is no test row.
        RecipeError: a metric needs what a model does not give.
    """
    rows = drawn(inputs.rows, section.rows, inputs.seed)
    if not rows:
        raise DataError("no test rows to evaluate on", where="data.split.test", fix="Hold some out: test: 0.1")
    if section.json_schema:
        shared = {"schema": json_in(local_file(section.json_schema, inputs.folder))}
        rows = [replace(row, metadata=shared | row.metadata) for row in rows]
    goal, metrics = chosen(section, inputs)
    limit = section.max_new_tokens or _limit(rows, inputs.subjects["baseline"])
    asked = probes.asked(section, inputs, rows, limit)

    if not all(subject.scores for subject in inputs.subjects.values()):
        metrics = [m for m in metrics if not m.likelihood]
    if goal not in [m.name for m in metrics]:
        raise RecipeError(
            f"the goal {goal} needs likelihoods, which an endpoint does not give",
            where="goal.metric",
            fix="Choose another: accuracy, exact_match, rouge_l, ...",
        )

    sides: dict[str, Side] = {}
    embedding: tuple[str, Any] | None = None
    found: dict[str, dict[str, Any]] = {probe.name: {} for probe in asked}
    for side in SIDES:
        subject = inputs.subjects[side]
        sides[side] = _asked(section, subject, rows, metrics, limit, side, inputs.seed, inputs.kind)
        embedding = embedding or _embedded(subject, rows)
        for probe in asked:
            found[probe.name][side] = probe.ask(subject, side, found[probe.name].get("baseline"))
        subject.close()

    stats = {m.name: {side: m.measure(sides[side].answers) for side in SIDES} for m in metrics}
    scores = {
        m.name: compared(m, stats[m.name], section.bootstrap, inputs.seed)
        | ({"details": {s: m.details(sides[s].answers) for s in SIDES}} if m.details else {})
        for m in metrics
    }
    holm(scores)
    decider = next(m for m in metrics if m.name == goal)
    card: dict[str, Any] = {
        "verdict": verdict(decider, scores[goal]["difference"]),
        "goal_metric": goal,
        "n": len(rows),
        "answers": inputs.kind,
        "max_new_tokens": limit,
        "models": {side: inputs.subjects[side].name for side in SIDES},
        "rounds": {"seeds": section.seeds, "temperature": section.heat},
        "metrics": scores,
        "failures": {side: dict(inputs.subjects[side].failures) for side in SIDES},
        "tasks": by_task(rows, metrics, stats, inputs.seed),
        "slices": slices(rows, inputs.kind, decider, stats[goal], inputs.seed),
    }
    if inputs.kind == "label" and not (decider.likelihood or decider.chooses):
        card["constant"] = _constant(decider, sides["tuned"].answers, stats[goal]["tuned"], section, inputs.seed)
    for probe in asked:
        for name, told in probe.compare(found[probe.name]).items():
            examples = told.pop("examples", [])
            card[name] = told
            if examples:  # what was asked and answered, a line each
                write_text(target / f"{name}.jsonl", "".join(map(json_line, examples)))
    lines = _lines(rows, sides, decider, stats[goal])
    if inputs.review and (told := reviewed(inputs.review, lines, target / "judge.jsonl")):
        card["review"] = told
    card["errors"] = mistakes(lines, inputs.kind, decider.higher_is_better, inputs.seed, embedding)
    card["gate"] = decide(inputs.gate.conditions if inputs.gate else None, card, inputs.gate is not None)
    write_json(target / "scorecard.json", card)
    write_text(target / "junit.xml", junit(inputs.subjects["tuned"].name, card))
    write_text(target / "answers.jsonl", "".join(map(json_line, lines)))
    return card


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


def _asked(
    section: EvaluateSection,
    subject: Kept,
    rows: Sequence[Conversation],
    metrics: Sequence[Metric],
    limit: int,
    side: str,
    seed: int,
    kind: str,
) -> Side:
    """One model's answers to the rows, and the likelihoods that the metrics need."""
    prompts = [Ask.of(row) for row in rows]
    rounds: list[list[Reply]] = []
    for number in range(section.seeds if any(not m.likelihood for m in metrics) else 0):
        sampling = Sampling(section.heat, seed + number) if section.heat else None
        title = f"Answers, {side}" + (f", round {number + 1}" if section.seeds > 1 else "")
        with bar(title, len(rows)) as progress:
            rounds.append(subject.replies(prompts, limit, progress.advance, sampling))
    nll, tokens = [float("nan")] * len(rows), [0] * len(rows)
    if subject.scores:
        with bar(f"Likelihood, {side}", len(rows)) as progress:
            likely = subject.likelihoods(rows, progress.advance)
        nll, tokens = [s.nll for s in likely], [s.tokens for s in likely]
    chooses = any(m.chooses for m in metrics)
    rounds = rounds or [[Reply("")] * len(rows)]
    texts = [[r.text for r in given] for given in rounds]
    answers = Answers(
        texts[0],
        [row.text if isinstance(row, Text) else row.answer for row in rows],
        nll,
        tokens,
        [row.metadata for row in rows],
        texts if len(texts) > 1 else (),
        _choices(subject, rows, side) if chooses else (),
        _pairs(subject, rows, side) if subject.scores else (),
    )
    return Side(answers, [list(of_row) for of_row in zip(*rounds, strict=True)])


def _embedded(subject: Kept, rows: Sequence[Conversation]) -> tuple[str, Any] | None:
    """The model's name and its embeddings of what the rows are about; none of what is not on this machine."""
    if len(rows) < FEWEST_ROWS:
        return None
    texts = [about(row.prompt, row.text if isinstance(row, Text) else row.answer) for row in rows]
    with bar("What rows are about", len(rows)) as progress:
        vectors = subject.embedded(texts, progress.advance)
    return None if vectors is None else (subject.name, vectors)


def _choices(subject: Kept, rows: Sequence[Conversation], side: str) -> list[list[tuple[str, float]]]:
    """Each row's choices and their negative log-likelihoods; the test rows' labels where a row names none."""
    labels = sorted({row.answer.strip() for row in rows})
    choices = [[str(c) for c in row.metadata.get("choices") or labels] for row in rows]
    made = [_answered(row, text) for row, texts in zip(rows, choices, strict=True) for text in texts]
    with bar(f"Choices, {side}", len(made)) as progress:
        scores = iter(subject.likelihoods(made, progress.advance))
    return [[(text, next(scores).nll) for text in texts] for texts in choices]


def _pairs(subject: Kept, rows: Sequence[Conversation], side: str) -> list[tuple[float, float]]:
    """What the endings of preferences get per token; nothing of other rows."""
    made = [conversation for row in rows if isinstance(row, Preference) for conversation in row.conversations]
    with bar(f"Pairs, {side}", len(made)) as progress:
        found = [s.nll / max(s.tokens, 1) for s in subject.likelihoods(made, progress.advance)]
    return list(zip(found[::2], found[1::2], strict=True))


def _answered(row: Conversation, text: str) -> Conversation:
    return replace(row, messages=(*row.prompt, Message("assistant", text)))


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
