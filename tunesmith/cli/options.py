"""What the verbs share: their arguments, and how they answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as train.epochs=1.")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Where runs lie; TUNESMITH_RUNS or ./runs if not given.")]
Nproc = Annotated[int, typer.Option("--nproc", min=1, help="Processes that train together; train.parallel says how.")]
Json = Annotated[bool, typer.Option("--json", help="Answer with JSON, for programs.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")]


def main_rank() -> bool:
    from tunesmith.train.ranks import Ranks

    return Ranks.of_environment().main


def answer(value: Any, as_json: bool) -> bool:
    """Print JSON where it was asked for."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False, indent=2, default=str))
    return as_json


def hush(as_json: bool) -> None:
    if as_json:
        from tunesmith.progress import quiet

        quiet()
