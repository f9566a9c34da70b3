"""Public tasks: lm-evaluation-harness's by name, and the same kinds of tasks on local files, scored as it does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import DataError, MachineError, RecipeError, first_line
from tunesmith.evaluate.bias import local_file
from tunesmith.evaluate.metrics.base import Answers, mean, measured, rows
from tunesmith.evaluate.metrics.code import pass_at_1
from tunesmith.evaluate.metrics.structured import numeric
from tunesmith.evaluate.section import SuiteSection
from tunesmith.evaluate.statistics import compared
from tunesmith.inference.subject import Ask, Continuation, Kept
from tunesmith.progress import bar

NEEDS = {
    "choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "numeric": ("answer",),
    "code": ("prompt", "test", "entry_point"),
    "chat": ("turns",),
}
ASKS = {"choice": "{query}", "numeric": "{question}", "schema": "", "code": "{prompt}"}


def task_rows(suite: SuiteSection, folder: Path, seed: int) -> list[dict[str, Any]]:
    """A local task's rows, drawn by seed.

    Raises:
        DataError: a row lacks what its kind of task needs.
    """
    path = local_file(suite.file or "", folder)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, row in enumerate(found, 1):
        lacking = [key for key in NEEDS[suite.kind] if key not in row]
        if lacking:
            raise DataError(
                f"lacks '{lacking[0]}', which tasks of kind {suite.kind} need (it has: {', '.join(row)})",
                where=f"{path.name}:{number}",
                fix="Name another kind (choice, schema, numeric, code, chat), or mend the file.",
            )
    picked = np.random.default_rng(seed).permutation(len(found))[: suite.rows or len(found)]
    return [found[i] for i in sorted(picked)]


def asked(suite: SuiteSection, row: dict[str, Any]) -> str:
    """A row's context: the suite's template, or its kind's own, filled in."""
    template = suite.template or ASKS[suite.kind]
    if suite.kind == "numeric" and not suite.template and "question" not in row:
        template = "{context}"
    try:
        return template.format_map(row)
    except KeyError as error:
        raise DataError(
            f"has no {error} for the template", where=suite.name, fix="Mend the suite's template."
        ) from error


class Suites:
    """The probe."""

    name = "suites"

    def __init__(self, suites: Sequence[SuiteSection], folder: Path, limit: int, count: int, seed: int) -> None:
        self.suites, self.bootstrap, self.seed, self.limit = suites, count, seed, limit
        self.rows = {s.name: task_rows(s, folder, seed) for s in suites if s.file}

    def ask(self, subject: Kept, side: str, baseline: Any) -> Any:
        found: dict[str, dict[str, list[float]]] = {}
        for suite in self.suites:
            if not suite.file:
                found[suite.name] = harness(subject, suite.name, suite.rows)
            elif suite.kind in ("choice", "schema"):
                found[suite.name] = self._likely(suite, subject, side)
            else:
                found[suite.name] = self._answered(suite, subject, side)
        return found

    def _likely(self, suite: SuiteSection, subject: Kept, side: str) -> dict[str, list[float]]:
        """acc and acc_norm (likelihood over characters) of the likeliest choice, as lm-evaluation-harness has them."""
        read = self.rows[suite.name]
        if suite.kind == "schema":  # the ending is the same, what it follows is chosen
            pairs = [[Continuation(c, " " + row["continuation"]) for c in row["context_options"]] for row in read]
        else:
            pairs = [[Continuation(asked(suite, row), " " + c) for c in row["choices"]] for row in read]
        flat = [pair for of_row in pairs for pair in of_row]
        with bar(f"{suite.name}, {side}", len(flat)) as progress:
            scores = iter(subject.likelihoods(flat, progress.advance))
        acc, norm = [], []
        for row, of_row in zip(read, pairs, strict=True):
            likely = np.array([-next(scores).nll for _ in of_row])
            lengths = np.array([len(pair.text) - 1 for pair in of_row])
            acc.append(float(int(likely.argmax()) == row["gold"]))
            norm.append(float(int((likely / lengths).argmax()) == row["gold"]))
        return {"acc": acc} | ({"acc_norm": norm} if suite.kind == "choice" else {})

    def _answered(self, suite: SuiteSection, subject: Kept, side: str) -> dict[str, list[float]]:
        read = self.rows[suite.name]
        asks = [Ask.user(asked(suite, row)) for row in read]
        with bar(f"{suite.name}, {side}", len(asks)) as progress:
            given = [r.text for r in subject.replies(asks, suite.max_new_tokens, progress.advance)]
        right = [str(row.get("answer", "")) for row in read]
        metric, name = (numeric, "acc") if suite.kind == "numeric" else (pass_at_1, "pass_at_1")
        answers = Answers(given, right, [0.0] * len(given), [0] * len(given), read)
        return {name: metric.measure(answers)[:, 0].tolist()}

    def compare(self, found: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {}
        for suite, scores in found["tuned"].items():
            for name in scores:
                both = {side: f[suite][name] for side, f in found.items()}
                whole = {value for values in both.values() for value in values} <= {0.0, 1.0}
                metric = measured(name, mean, higher_is_better=name not in LOWER, binary=whole)
                stats = {side: rows(values) for side, values in both.items()}
                told.setdefault(suite, {})[name] = compared(metric, stats, self.bootstrap, self.seed)
        return {self.name: told}


LOWER = {"word_perplexity", "byte_perplexity", "bits_per_byte", "wer", "brier_score", "perplexity"}


def harness(subject: Kept, task: str | dict[str, Any], limit: int | None) -> dict[str, list[float]]:
    """Each row's scores on one of lm-evaluation-harness's tasks, by its Python API, with this model.

    Raises:
        MachineError: lm-eval is not installed. RecipeError: no such task, or its data can't be reached.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise MachineError(
            "public tasks need the package lm-eval",
            where="evaluate.suites",
            fix="Install it: pip install 'tunesmith[suites]'",
        ) from error
    local: Any = subject.subject
    if not hasattr(local, "engine"):
        raise RecipeError("is an endpoint, which can't be given to lm-eval", where=subject.name, fix="Use local files.")
    name = task if isinstance(task, str) else task["task"]
    try:
        model = HFLM(pretrained=local.engine.model, tokenizer=local.renderer.tokenizer, batch_size=8)
        found = simple_evaluate(model=model, tasks=[task], limit=limit, bootstrap_iters=0, log_samples=True)
    except Exception as error:  # the harness, its data sets and the hub raise anything
        raise RecipeError(
            f"lm-eval can't run '{name}' ({type(error).__name__}: {first_line(error)})",
            where="evaluate.suites",
            fix="Check the task's name (lm-eval ls tasks) and the network, or name a local file.",
        ) from error
    scores: dict[str, list[float]] = {}
    for rows_of_task in found["samples"].values():
        for row in sorted(rows_of_task, key=lambda r: r["doc_id"]):
            for metric in row["metrics"]:
                if isinstance(row.get(metric), int | float):
                    scores.setdefault(metric, []).append(float(row[metric]))
    return scores
