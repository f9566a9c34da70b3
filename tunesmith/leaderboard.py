"""Runs ranked by a metric on the rows that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import recipe as recipes
from tunesmith import runs
from tunesmith.errors import DataError, RecipeError, RunError
from tunesmith.runs import Run, hash_json, read_jsonl

if TYPE_CHECKING:
    from tunesmith.evaluate.metrics import Metric

RESAMPLES, SEED = 2000, 7
Lines = dict[str, dict[str, Any]]  # of answers.jsonl, by what was asked


def leaderboard(
    names: Sequence[str], metric: str | None = None, runs_folder: str | Path | None = None
) -> dict[str, Any]:
    """Runs ranked by a metric on the test rows that all of them answered, each compared with the first, from the
    answers that their evaluations kept. Paired on the rows; p values corrected (Holm) for the number of runs.

    Raises:
        RunError: a run that is not evaluated. DataError: the runs share no test row, or tell no likelihoods that the
            metric needs. RecipeError: a metric that answers alone do not give.
    """
    from tunesmith.evaluate.statistics import compared, holm, verdict

    named = runs.told_apart([runs.get(name, runs_folder) for name in names])
    answered = {name: _lines(run) for name, run in named.items()}
    shared = [key for key in next(iter(answered.values())) if all(key in lines for lines in answered.values())]
    if not shared:
        where, fix = ", ".join(named), "Compare runs that were tested on the same rows."
        raise DataError("the runs share no test row", where=where, fix=fix)
    first = next(iter(named))
    decider = _decider(metric or _goal(named[first]))
    stats = {name: _measured(decider, name, [lines[key] for key in shared]) for name, lines in answered.items()}
    pairs = {name: {"baseline": stats[first], "tuned": its} for name, its in stats.items()}
    scores = {name: compared(decider, pair, RESAMPLES, SEED) for name, pair in pairs.items()}
    holm({name: score for name, score in scores.items() if name != first})
    lines = {name: {"run": name, "score": score["tuned"]} for name, score in scores.items()}
    for name in scores.keys() - {first}:
        gap = scores[name]["difference"]
        lines[name] |= {"difference": gap, "verdict": verdict(decider, gap)}
    sign = -1 if decider.higher_is_better else 1
    ranked = sorted(lines.values(), key=lambda line: sign * line["score"]["value"])
    return {"metric": decider.name, "n": len(shared), "against": first, "runs": ranked}


def _lines(run: Run) -> Lines:
    """What a run's evaluation kept."""
    if run.scores is None:
        raise RunError("is not evaluated yet", where=str(run.path), fix="Evaluate it: tunesmith evaluate RECIPE")
    lines = read_jsonl(run.stage("evaluate") / "answers.jsonl")
    return {hash_json([line["prompt"], line["reference"]]): line for line in lines}


def _goal(run: Run) -> str:
    """The metric that a run's verdict was about, as a recipe names it."""
    goal: str = (run.scores or {})["goal_metric"]
    evaluated = recipes.load(run.recipe)[0]
    own = [name for name in (evaluated.goal.metric, *(evaluated.evaluate.metrics or ())) if name and ":" in name]
    return next((name for name in own if name.rpartition(":")[2] == goal), goal)


def _decider(name: str) -> Metric:
    from tunesmith.evaluate.evaluate import metric_named

    found = metric_named(name, Path.cwd())
    if found.chooses or found.name == "preference":
        what = f"{found.name} can't be told from answers alone"
        raise RecipeError(what, where="--metric", fix="Choose another metric, such as --metric loss.")
    return found


def _measured(metric: Metric, name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """The metric's sums over what the tuned model of a run answered."""
    from tunesmith.evaluate.metrics import Answers

    told = [row["tuned"] for row in rows]
    if metric.likelihood and any(one["nll"] is None for one in told):
        raise DataError(
            f"{metric.name} needs likelihoods, which this run's answers have none of",
            where=name,
            fix="Choose another metric: --metric exact_match, rouge_l, ...",
        )
    return metric.measure(
        Answers(
            [one["answer"] for one in told],
            [row["reference"] for row in rows],
            [float("nan") if one["nll"] is None else one["nll"] for one in told],
            [one["tokens"] for one in told],
            [row.get("metadata", {}) for row in rows],
            list(zip(*(one["samples"] for one in told), strict=True)) if "samples" in told[0] else (),
        )
    )
