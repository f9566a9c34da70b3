"""`tunesmith runs`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tunesmith.cli.options import Json, RunName, Runs, answer
from tunesmith.errors import RunError

app = typer.Typer(help="Look at runs, compare them, remove them.", no_args_is_help=True)


@app.command("list")
def runs_list(runs: Runs = None, as_json: Json = False) -> None:
    """All runs, newest last, with their verdicts."""
    from tunesmith import show
    from tunesmith.runs import every

    found = [show.line(r) for r in every(runs)]
    if not answer(found, as_json):
        show.table(found, "No runs here yet. Make one: tunesmith run quickstart")


@app.command("show")
def runs_show(run: RunName, runs: Runs = None, as_json: Json = False) -> None:
    """One run: its stages, scores and files."""
    from tunesmith import show
    from tunesmith.pipeline import open_run

    result = open_run(run, runs)
    if not answer(show.summary(result), as_json):
        show.stages(result)
        show.ending(result)


@app.command("diff")
def runs_diff(run: RunName, other: RunName, runs: Runs = None, as_json: Json = False) -> None:
    """What differs between two runs: recipe, versions, scores."""
    from tunesmith import show
    from tunesmith.runs import get

    found = show.differences(get(run, runs), get(other, runs))
    if not answer(found, as_json):
        show.table(found, "The two runs do not differ.")


@app.command("rm")
def runs_rm(
    run: RunName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Remove a run and all its files."""
    import shutil

    from tunesmith.runs import get

    found = get(run, runs)
    if not yes and (as_json or not sys.stdin.isatty()):
        raise RunError("is only removed with --yes where nobody can be asked", where=str(found.path), fix="Add --yes.")
    if not yes:
        typer.confirm(f"Remove {found.path} with all its files?", abort=True)
    with found.lock():
        shutil.rmtree(found.path)
    if not answer({"removed": str(found.path)}, as_json):
        print(f"Removed {found.path}")
