"""Public tasks: lm-evaluation-harness's by name, and the same kinds of tasks on local files, scored as it does."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import DataError, MachineError, RecipeError, first_line
from tunesmith.evaluate.files import local_file, rows_of
from tunesmith.evaluate.metrics.base import Answers, Floats, mean, measured, rows
from tunesmith.evaluate.metrics.code import pass_at_1
from tunesmith.evaluate.metrics.structured import numeric
from tunesmith.evaluate.section import SuiteSection
from tunesmith.evaluate.statistics import compared
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask, Continuation
from tunesmith.progress import bar, say

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
    found = rows_of(path, NEEDS[suite.kind], f"tasks of kind {suite.kind}")
    for number, row in enumerate(found, 1):
        options = row.get({"choice": "choices", "schema": "context_options"}.get(suite.kind, ""))
        if suite.kind in ("choice", "schema") and not _chooses(options, row["gold"]):
            raise DataError(
                f"its gold ({row['gold']!r}) is no place among its choices ({options!r})",
                where=f"{path.name}, row {number}",
                fix="Choices are a list of texts, and gold counts from 0.",
            )
        if suite.kind == "chat" and not (row["turns"] and _texts(row["turns"])):
            raise DataError(
                "its turns are no list of texts", where=f"{path.name}, row {number}", fix="Give a text for each turn."
            )
        if suite.kind == "schema" and not isinstance(row["continuation"], str):
            what = f"its continuation ({row['continuation']!r}) is no text"
            raise DataError(what, where=f"{path.name}, row {number}", fix="Mend the row.")
    picked = np.random.default_rng(seed).permutation(len(found))[: suite.rows or len(found)]
    return [found[i] for i in sorted(picked)]


def _chooses(options: Any, gold: Any) -> bool:
    """Whether there are texts to choose of, and the right one's place is one of theirs."""
    return _texts(options) and all(options) and isinstance(gold, int) and 0 <= gold < len(options)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def asked(suite: SuiteSection, row: dict[str, Any]) -> str:
    """A row's context: the suite's template, or its kind's own, filled in."""
    template = suite.template or ASKS[suite.kind]
    if suite.kind == "numeric" and not suite.template and "question" not in row:
        template = "{context}"
    try:
        return template.format_map(row)
    except (KeyError, IndexError, AttributeError) as error:
        raise DataError(
            f"has no {error} for the template", where=suite.name, fix="Mend the suite's template."
        ) from error
    except (ValueError, TypeError) as error:  # such as {column:d} of a text
        what = f"its template can't be filled in ({first_line(error)})"
        raise DataError(what, where=suite.name, fix="Mend the suite's template.") from error


class Suites:
    """The probe."""

    name = "suites"

    def __init__(self, suites: Sequence[SuiteSection], folder: Path, limit: int, count: int, seed: int) -> None:
        self.suites, self.bootstrap, self.seed, self.limit = suites, count, seed, limit
        self.rows = {s.name: task_rows(s, folder, seed) for s in suites if s.file}

    def ask(self, subject: Kept, side: str, baseline: Any) -> Any:
        found: dict[str, dict[str, list[Any]]] = {}
        for suite in self.suites:
            if not suite.file:
                found[suite.name] = harness(subject, suite.name, suite.rows, suite.shots)
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
                stats = {side: _vectors(f[suite][name]) for side, f in found.items()}
                value = VALUES.get(name.partition(":")[0], mean)
                whole = value is mean and {float(x) for part in stats.values() for x in part[:, 0]} <= {0.0, 1.0}
                better = name.partition(":")[0] not in LOWER
                metric = measured(name, value, higher_is_better=better, binary=whole)
                told.setdefault(suite, {})[name] = compared(metric, stats, self.bootstrap, self.seed)
        return {self.name: told}


def _vectors(values: Sequence[Any]) -> Floats:
    """Scores, or (log-likelihood, weight) of each row, as vectors [n, 2]."""
    return np.asarray(values, dtype=np.float64) if isinstance(values[0], list) else rows(values)


def _perplexity(sums: Floats) -> Floats:
    return np.exp(-mean(sums))


# Of the harness's metrics, those that are not the mean of what rows give.
VALUES = dict.fromkeys(("perplexity", "word_perplexity", "byte_perplexity"), _perplexity)
VALUES["bits_per_byte"] = lambda sums: -mean(sums) / np.log(2)
LOWER = {*VALUES, "wer", "ter", "brier_score"}


def harness(
    subject: Kept, task: str | dict[str, Any], limit: int | None, shots: int | None = None
) -> dict[str, list[Any]]:
    """Each row's scores on one of lm-evaluation-harness's tasks, by its Python API, with this model: numbers, or
    [log-likelihood, weight] where the metric is a perplexity. Where a task reads answers in several ways, each is a
    score of its own (`exact_match:strict-match`). What was found is kept with the model's answers.

    Raises:
        MachineError: lm-eval is not installed. RecipeError: no such task, or its data can't be reached.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise MachineError(
            "public tasks need the package lm-eval",
            where="evaluate.suites",
            fix="Install it: pip install 'tunesmith[suites]'",
        ) from error
    name = task if isinstance(task, str) else task["task"]
    asked = ["lm-eval", lm_eval.__version__, task, limit, shots]
    found = subject.noted(asked, lambda: _by_row(subject, task, limit, shots))
    if left := found["left_out"]:
        say(f"{name}: {', '.join(left)} of lm-eval can't be told from single rows, and is left out")
    if not found["scores"]:
        raise RecipeError(
            f"'{name}' of lm-eval gives no score that single rows have",
            where="evaluate.suites",
            fix="Take another task: both models are compared row by row.",
        )
    scores: dict[str, list[Any]] = found["scores"]
    return scores


def _by_row(subject: Kept, task: str | dict[str, Any], limit: int | None, shots: int | None) -> dict[str, Any]:
    """The scores of a task, and the names of those that single rows don't have."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    local: Any = subject.subject
    if not hasattr(getattr(local, "engine", None), "model"):
        raise RecipeError(
            "is no language model of transformers, which lm-eval asks", where=subject.name, fix="Use local files."
        )
    name = task if isinstance(task, str) else task["task"]
    try:
        model = HFLM(pretrained=local.engine.model, tokenizer=local.renderer.tokenizer, batch_size=8)
        found = simple_evaluate(
            model=model, tasks=[task], num_fewshot=shots, limit=limit, bootstrap_iters=0, log_samples=True
        )
    except Exception as error:  # the harness, its data sets and the hub raise anything
        raise RecipeError(
            f"lm-eval can't run '{name}' ({type(error).__name__}: {first_line(error)})",
            where="evaluate.suites",
            fix="Check the task's name (lm-eval ls tasks) and the network, or name a local file.",
        ) from error
    samples = found["samples"].values()
    return _told([row for of_task in samples for row in sorted(of_task, key=lambda row: row["doc_id"])])


def _told(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    filters = dict.fromkeys(row["filter"] for row in samples)
    scores: dict[str, list[Any]] = {}
    left: dict[str, None] = {}
    for row in samples:
        for metric in row["metrics"]:
            value, name = row.get(metric), f"{metric}:{row['filter']}" if len(filters) > 1 else metric
            if isinstance(value, Real):
                scores.setdefault(name, []).append(float(value))
            elif metric in VALUES and isinstance(value, tuple | list):
                scores.setdefault(name, []).append([float(x) for x in value])
            else:
                left[metric] = None
    return {"scores": scores, "left_out": list(left)}
