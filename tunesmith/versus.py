"""Models by name: any two on a file's rows."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tunesmith import recipe as recipes
from tunesmith import runs
from tunesmith.errors import DataError, ModelError, RunError, nearest
from tunesmith.kit import Kit, endpoint
from tunesmith.progress import say
from tunesmith.recipe import Recipe
from tunesmith.runs import Run, hash_json, read_jsonl

if TYPE_CHECKING:
    from tunesmith.evaluate.evaluate import EvaluateInputs


def evaluate(
    model: str,
    against: str,
    data: str,
    out: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    base: str | None = None,
    runs_folder: str | Path | None = None,
) -> dict[str, Any]:
    """Compare two models on a file's rows; writes scorecard, answers, report and JUnit XML into `out`.

    Args:
        model, against: hub id, folder, .gguf file, built-in name, run, adapter's folder, or `http://host/v1#name`.
        recipe: whose settings of `goal`, `evaluate`, `gate` and `data` (but its files) hold.
        base: the base of an adapter that does not name its own.

    Raises:
        TunesmithError: one of its kinds.
    """
    from tunesmith.data.prepare import answers_kind, rows_of
    from tunesmith.evaluate.evaluate import EvaluateInputs
    from tunesmith.evaluate.evaluate import evaluate as compare_both
    from tunesmith.evaluate.report import write_report

    settings = _settings(model, data, recipe, overrides)
    there = Run(out)
    with there.lock():
        rows = rows_of(settings.data, Path.cwd())
        again = len(rows) - len({hash_json(row.as_dict() | {"id": "", "metadata": {}}) for row in rows})
        if again:
            say(f"{again} of {len(rows)} rows repeat an earlier one; intervals take each for a row of its own")
        kind = answers_kind(rows) if settings.data.answers == "auto" else settings.data.answers
        subjects = {
            side: subject(name, settings, there, base, runs_folder, rows)
            for side, name in (("baseline", against), ("tuned", model))
        }
        inputs = EvaluateInputs(
            rows, kind, settings.goal.metric, subjects, settings.seed, Path.cwd(), settings.gate,
            judge=Kit(settings, Path.cwd(), there).judge(), review=there.review,
        )  # fmt: skip
        runs.write_text(there.recipe, yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False))
        started = time.time()
        with runs.whole_folder(there.stage("evaluate")) as target:
            card = compare_both(settings.evaluate, inputs, target)
            runs.write_json(target / "manifest.json", _manifest(settings, inputs, card, target, started))
        runs.write_json(there.scorecard, card)
        write_report(there)
    return card


def _manifest(settings: Recipe, inputs: EvaluateInputs, card: dict[str, Any], target: Path, started: float) -> Any:
    """What an evaluation was made from: both models, the rows' files, the settings, and with what."""
    from tunesmith.models.machine import machine

    models = {side: subject.origin for side, subject in inputs.subjects.items()}
    named = [source.path for source in settings.data.sources if source.path]
    files = [Path(os.path.expandvars(path)).expanduser() for path in named]
    hashes = {path.name: runs.hash_file(path) for path in files if path.is_file()}
    asked = settings.model_dump(mode="json", include={"goal", "evaluate", "gate", "seed"})
    here = any(told["source"] != "endpoint" for told in models.values())  # endpoints alone need no machine
    return {
        "stage": "evaluate",
        "key": runs.hash_json({"models": models, "inputs": hashes, "asked": asked}),
        "models": models,
        "parents": {},
        "inputs": hashes,
        "outputs": runs.outputs_of(target),
        "verdict": card["verdict"],
        "gate": card["gate"]["decision"],
        "seed": settings.seed,
        "versions": runs.versions(),
        "machine": machine().as_dict() if here else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": round(time.time() - started, 1),
    }


def _settings(model: str, data: str, recipe: str | None, overrides: Sequence[str]) -> Recipe:
    raw: dict[str, Any] = {}
    if recipe is not None:
        keys = recipes.load(recipe)[0].model_dump(mode="json")
        raw = {key: keys[key] for key in ("seed", "goal", "evaluate", "gate")}
        first = keys["data"]["sources"][0]
        raw["data"] = keys["data"] | {"sources": [first | {"path": data, "format": "auto"}]}
    raw.setdefault("data", {"sources": [{"path": data}]})
    raw["data"]["split"] = {"validation": 0, "test": 0}
    raw |= {"name": "evaluation", "model": {"name": model}}
    return recipes.build(raw, overrides, recipe or "evaluate --model")


def subject(
    name: str, settings: Recipe, there: Run, base: str | None, runs_folder: str | Path | None, rows: Sequence[Any] = ()
) -> Any:
    """A model by name, as something to ask; its answers are kept in `there`.

    Raises:
        ModelError: there is none. DataError: one of the `rows` that it is to be asked is longer than its context.
    """
    behind = endpoint(name, there)
    if behind is not None:
        return behind
    run = _run_named(name, runs_folder)
    if run is not None:
        recipe, folder = recipes.load(run.recipe)
        kit = Kit(recipe, folder, run)
        if run.complete("train") is None:
            raise RunError("is not trained yet", where=str(run.path), fix="Finish it: tunesmith run RECIPE")
        _refuse_long(kit, rows)
        return kit.kept(there, run.tuned, run.name, settings.evaluate.engine)
    folder = Path(name).expanduser()
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    if adapter is not None:
        named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        base = base or named.get("base_model_name_or_path")
        if not base:
            raise ModelError("names no base model", where=str(adapter), fix="Give it: --base MODEL")
    keys = settings.model_dump(mode="json")
    recipe = recipes.build(keys | {"model": {"name": (base if adapter else name) or name}}, (), "evaluate --model")
    kit = Kit(recipe, Path.cwd(), there)
    try:
        _refuse_long(kit, rows)
        return kit.kept(there, adapter, name, settings.evaluate.engine)
    except ModelError as error:
        if error.where != "model.name":
            raise
        names = [run.name for run in runs.every(runs_folder)]
        what = f"no model, run or adapter is called '{name}'{nearest(name, names)}"
        raise ModelError(what, where="evaluate --model", fix=error.fix) from None


def _refuse_long(kit: Kit, rows: Sequence[Any]) -> None:
    """Raise where a row is longer than the model's context: what it says of it would mean nothing."""
    from tunesmith.conversation.message import Text
    from tunesmith.models.load import context_length

    context = context_length(kit.model)
    if context is None:
        return
    for row in rows:
        plain = isinstance(row, Text)
        texts = [row.text] if plain else [m.content for m in row.messages]
        if sum(len(text.encode()) for text in texts) < context // 2:
            continue  # a token has a byte or more; the other half is for what the template adds
        tokens = len(kit.renderer.render_text(row) if plain else kit.renderer.render(row, only_last=True))
        if tokens > context:
            raise DataError(
                f"has {tokens:,} tokens, and {kit.model.name} reads {context:,}",
                where=row.id,
                fix="Leave the row out, or shorten it.",
            )


def _run_named(name: str, runs_folder: str | Path | None) -> Run | None:
    try:
        return runs.get(name, runs_folder)
    except RunError:
        return None


def golden(model: str, suite: Path, out: Path, base: str | None = None, runs_folder: Any = None) -> dict[str, Any]:
    """Ask a model, by name, a suite's golden cases; writes JUnit XML into `out`."""
    from tunesmith.evaluate.golden import check, load
    from tunesmith.evaluate.junit import junit

    cases = load(suite)
    there = Run(out)
    with there.lock():
        settings = _settings(model, str(suite), None, ())
        asked = subject(model, settings, there, base, runs_folder)
        told = check(cases, asked)
        runs.write_text(out / "junit.xml", junit(suite.stem, {"gate": {"conditions": []}, "suite": {"cases": told}}))
    return {"model": model, "passed": all(case["passed"] for case in told), "cases": told}


def add_golden(name: str, row: str, suite: Path, runs_folder: Any = None) -> str:
    """Add a row of a run's report, or of the report in an evaluation's folder, to a suite.

    Raises:
        DataError: the run answered no such row.
    """
    from tunesmith.evaluate.golden import add

    beside = Run(Path(name))
    run = beside if (beside.stage("evaluate") / "answers.jsonl").is_file() else runs.get(name, runs_folder)
    lines = read_jsonl(run.stage("evaluate") / "answers.jsonl")
    found = next((line for line in lines if line["id"] == row), None)
    if found is None:
        known = [line["id"] for line in lines]
        raise DataError(f"no row '{row}' was answered{nearest(row, known)}", where=name, fix="Its id is in the report.")
    return add(suite, found)
