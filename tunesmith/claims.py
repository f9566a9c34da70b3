"""Whose run it is: a run's name belongs to the recipe that made it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith import runs
from tunesmith.data.section import is_url
from tunesmith.errors import RunError
from tunesmith.recipe import Recipe, kept
from tunesmith.runs import Run


def refuse_anothers(run: Run, resolved: dict[str, Any], origin: str | None) -> None:
    """Raise where the run's name is taken by another recipe."""
    if not run.recipe.is_file():
        return
    earlier = kept(run)
    came_from = runs.read_json(run.origin).get("recipe") if run.origin.is_file() else None
    differing = [k for k in ("model", "data", "train", "seed") if earlier.get(k) != resolved[k]]
    if differing and (origin is None or origin != came_from):
        raise RunError(
            f"run '{run.name}' was made by another recipe ({came_from or 'from Python'}); "
            f"it differs in: {', '.join(differing)}",
            where=str(run.path),
            fix=f"Use another name (--set name=...), or remove that run: tunesmith runs rm {run.name}",
        )


def origin_of(run: Run) -> str:
    """What to type after a verb to mean this run again: its recipe, what was set, and where runs lie."""
    told = runs.read_json(run.origin)
    words = [str(told["recipe"] or run.recipe)]
    words += [word for override in told.get("overrides", []) for word in ("--set", override)] if told["recipe"] else []
    elsewhere = run.path.resolve().parent != runs.runs_folder().resolve()
    return shlex.join(words + (["--runs", str(run.path.parent)] if elsewhere else []))


def claim(run: Run, resolved: dict[str, Any], origin: str | None, overrides: Sequence[str]) -> None:
    """Write the recipe into the run's folder; a run that a recipe of the same content owns stays that one's."""
    told = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
    if run.recipe.is_file() and run.origin.is_file() and run.recipe.read_text(encoding="utf-8") == told:
        return
    runs.write_text(run.recipe, told)
    runs.write_json(run.origin, {"recipe": origin, "overrides": list(overrides)})


def absolute(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The recipe's keys with every default filled in and paths that hold from anywhere."""
    keys = recipe.model_dump(mode="json")

    def whole(path: str) -> str:
        return path if is_url(path) else str((folder / Path(os.path.expandvars(path)).expanduser()).resolve())

    for source in keys["data"]["sources"]:
        for key in ("path", "media_folder"):
            source |= {key: whole(source[key])} if source[key] else {}
    for part in ("validation", "test"):
        given = keys["data"]["split"][part]
        if isinstance(given, str):
            keys["data"]["split"][part] = whole(given)

    def metric(name: str) -> str:  # a function of one's own lies in a file
        path, _, function = name.rpartition(":")
        return f"{whole(path)}:{function}" if ".py:" in name else name

    goal, evaluated = keys["goal"], keys["evaluate"]
    goal |= {"metric": metric(goal["metric"])} if goal["metric"] else {}
    evaluated |= {"metrics": [metric(name) for name in evaluated["metrics"]]} if evaluated["metrics"] else {}
    evaluated |= {"json_schema": whole(evaluated["json_schema"])} if evaluated["json_schema"] else {}
    judge = evaluated["judge"] or {}
    judge |= {"human": whole(judge["human"])} if judge.get("human") else {}
    for suite in evaluated["suites"]:
        suite |= {"file": whole(suite["file"])} if suite["file"] else {}
    bias = evaluated["bias"] or {}
    bias |= {key: whole(bias[key]) for key in ("bbq", "crows_pairs") if bias.get(key)}
    for term in keys["train"]["keep"]:
        if "rows" in term:
            term["rows"] = whole(term["rows"])
    for section, key in ((keys["model"], "name"), (keys["train"], "start_from")):  # or a name, which stays one
        for path in (folder / section[key], Path(section[key]).expanduser()) if section[key] else ():
            if path.exists() and (key == "name" or any(path.glob("*.safetensors"))):
                section[key] = str(path.resolve())
                break
    return keys
