"""Prepared sets: made without training, looked at in a report, compared with one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from tunesmith import pipeline, runs
from tunesmith import recipe as recipes
from tunesmith.errors import RunError
from tunesmith.kit import Kit
from tunesmith.runs import Run

DvcFile = Literal["data.dvc", "dvc.yaml"]
DVC_FILES = get_args(DvcFile)


@dataclass(frozen=True)
class Prepared:
    """A prepared set: its run, its manifest, and DVC's file where one was asked for."""

    run: Run
    manifest: dict[str, Any]
    dvc: Path | None = None

    @property
    def folder(self) -> Path:
        return self.run.stage("data")

    def as_dict(self) -> dict[str, Any]:
        return {
            "run": self.run.name,
            "path": str(self.folder),
            "version": self.manifest["version"],
            "counts": self.manifest["counts"],
            "dvc": str(self.dvc) if self.dvc else None,
        }


def prepare(
    recipe: str, overrides: Sequence[str] = (), runs_folder: str | Path | None = None, dvc: DvcFile | None = None
) -> Prepared:
    """Prepare a recipe's data and nothing else; `dvc` is the file to write beside it.

    Raises:
        TunesmithError: as the data stage does.
    """
    result = pipeline.run(recipe, overrides, runs_folder, ("data",))
    manifest = result.run.manifest("data")
    assert manifest is not None  # the stage is complete
    written: Path | None = None
    if dvc is not None:
        from tunesmith.data.card import dvc_note

        for other in DVC_FILES:  # DVC takes no folder that two files tell of
            (result.run.path / other).unlink(missing_ok=True)
        written = result.run.path / dvc
        as_typed = ["tunesmith", "data", "prepare", recipe, *(word for o in overrides for word in ("--set", o))]
        as_typed += ["--runs", str(runs_folder)] if runs_folder is not None else []
        content = dvc_note(result.run.stage("data")) if dvc == "data.dvc" else _stage(result.run, as_typed, manifest)
        runs.write_text(written, content)
    return Prepared(result.run, manifest, written)


def _stage(run: Run, command: Sequence[str], manifest: dict[str, Any]) -> str:
    """A stage of DVC's that prepares the set by this command, as it was given in this folder; what it needs are the
    recipe's file and the sources' that lie here."""
    from tunesmith.data.card import dvc_stage
    from tunesmith.models.resolve import cache_folder

    cache = cache_folder().resolve()
    files = [Path(command[3]), *map(Path, manifest["inputs"])]
    here = [file for file in files if file.is_file() and not file.resolve().is_relative_to(cache)]
    needs = sorted({os.path.relpath(file) for file in here})
    return dvc_stage(run.name, command, os.path.relpath(".", run.path), needs, os.path.relpath(run.stage("data")))


def report(
    name: str, overrides: Sequence[str] = (), runs_folder: str | Path | None = None
) -> tuple[Path, dict[str, Any]]:
    """Write data_report.html and data_report.json of a run's data, or of a recipe's, which is prepared first.

    Returns:
        The page's path, and what it tells.
    """
    from tunesmith.data.report import page
    from tunesmith.data.survey import survey

    there = _run(name, runs_folder)
    if there is None:
        there = prepare(name, overrides, runs_folder).run
    elif overrides:
        raise RunError("a run is reported as it is", where="--set", fix="Give the recipe instead of the run.")
    manifest = there.complete("data")
    if manifest is None:
        raise RunError("has no prepared data", where=str(there.path), fix="tunesmith data prepare RECIPE")
    recipe, folder = recipes.load(there.recipe)
    kit = Kit(recipe, folder, there)
    renderer, method = kit.renderer, recipe.train.method

    def tokens(row: Any) -> list[list[tuple[str, float]]]:
        row = row.words
        if row.kind == method.takes:
            made = method.encode([row], renderer, recipe.train.max_length)
            sequences = [s for examples in made for example in examples for s in example.sequences]
        else:  # a set can be looked at before its method is chosen
            sequences = [renderer.render(conversation) for conversation in row.conversations]
        decode = renderer.tokenizer.decode
        return [[(decode([i]), w) for i, w in zip(s.ids, s.weights, strict=True)] for s in sequences]

    found = survey(there.stage("data"), manifest, tokens, recipe.train.max_length, recipe.seed)
    target = there.path / "data_report.html"
    runs.write_json(target.with_suffix(".json"), found)
    runs.write_text(target, page(there.name, found))
    return target, found


def diff(old: str, new: str, runs_folder: str | Path | None = None) -> dict[str, Any]:
    """What changed between two prepared sets: runs, or folders that hold train.jsonl."""
    from tunesmith.data.diff import diff as compare

    return compare(_folder(old, runs_folder), _folder(new, runs_folder))


def _folder(name: str, runs_folder: str | Path | None) -> Path:
    for path in (Path(name), Path(name) / "data"):
        if (path / "train.jsonl").is_file():
            return path
    return runs.get(name, runs_folder).stage("data")


def _run(name: str, runs_folder: str | Path | None) -> Run | None:
    """The run of that name; None where the name is a recipe's file, or nothing here."""
    if Path(name).is_file():
        return None
    try:
        return runs.get(name, runs_folder)
    except RunError:
        return None
