"""`tunesmith data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.options import Json, RecipeName, Runs, Sets, answer, hush

app = typer.Typer(
    help="Prepare data without training, report on it, compare it, label it; see how far annotators agree.",
    no_args_is_help=True,
)


@app.command("prepare")
def data_prepare(
    recipe: RecipeName,
    sets: Sets = None,
    runs: Runs = None,
    dvc: Annotated[bool, typer.Option("--dvc", help="Write data.dvc beside it, for teams that use DVC.")] = False,
    stage: Annotated[
        bool, typer.Option("--dvc-stage", help="Write dvc.yaml in its place: dvc repro prepares the set anew.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Read, clean and split a recipe's rows, and nothing after that."""
    hush(as_json)
    from tunesmith import sets as prepared
    from tunesmith import show

    found = prepared.prepare(recipe, sets or [], runs, "dvc.yaml" if stage else "data.dvc" if dvc else None)
    if not answer(found.as_dict(), as_json):
        show.prepared(found)


@app.command("report")
def data_report(
    name: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, which is prepared first, or a run.")],
    sets: Sets = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """One page on a prepared set: counts, lengths, labels, privacy, contamination, and what to fix first."""
    hush(as_json)
    from tunesmith import sets as prepared
    from tunesmith import show

    page, found = prepared.report(name, sets or [], runs)
    if not answer(found | {"page": str(page)}, as_json):
        show.data_report(page, found)


@app.command("diff")
def data_diff(
    old: Annotated[str, typer.Argument(metavar="A", help="A run, or a folder with prepared rows.")],
    new: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """What changed from one prepared set to another: rows, lengths, labels."""
    hush(as_json)
    from tunesmith import sets as prepared
    from tunesmith import show

    found = prepared.diff(old, new, runs)
    if not answer(found, as_json):
        show.data_diff(found)


DataFile = Annotated[Path, typer.Argument(metavar="DATA", help="A file of rows, of any format that is read.")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; JSONL.")]


@app.command("label")
def data_label(
    rules: Annotated[Path, typer.Argument(metavar="RULES", help="A Python file of functions: row -> label or None.")],
    data: DataFile,
    out: OutFile = None,
    truth: Annotated[str | None, typer.Option("--truth", help="A column of right labels, to measure with.")] = None,
    as_json: Json = False,
) -> None:
    """Label rows by rules that vote; a label model weighs them by how they agree. Runs the Python file."""
    hush(as_json)
    from tunesmith import show
    from tunesmith.data.labels.weak import label
    from tunesmith.runs import json_line, write_text

    found = label(rules, data, truth)
    if out is not None:
        write_text(out, "".join(map(json_line, found.rows)))
    told = found.facts | {"rules": found.rules, "unlabelled": found.unlabelled, "broken": found.broken}
    if not answer(told, as_json):
        show.labelled(found, out)


@app.command("agreement")
def data_agreement(
    data: DataFile,
    item: Annotated[str, typer.Option("--item", help="The column of items; {} stands for a number.")] = "item",
    annotator: Annotated[str, typer.Option("--annotator", help="The column of annotators.")] = "annotator",
    label: Annotated[str, typer.Option("--label", help="The column of labels, or Label Studio's control.")] = "label",
    level: Annotated[str, typer.Option("--level", help="nominal, ordinal, interval or ratio.")] = "nominal",
    adjudicate: Annotated[str | None, typer.Option("--adjudicate", help="majority or dawid_skene.")] = None,
    out: OutFile = None,
    as_json: Json = False,
) -> None:
    """How far annotators agree, where they do not, and one label for each item."""
    hush(as_json)
    from tunesmith import show
    from tunesmith.data.labels import agreement as agreeing
    from tunesmith.data.labels.judgements import read_judgements
    from tunesmith.runs import json_line, write_text

    judgements = read_judgements(data, item, annotator, label)
    found = agreeing.agreement(judgements, agreeing.level_named(level))
    if adjudicate is not None:
        rows = agreeing.adjudicate(judgements, agreeing.way_named(adjudicate))
        found["adjudicated"] = {"rows": len(rows), "ties": sum(row["label"] is None for row in rows)}
        if out is not None:
            write_text(out, "".join(map(json_line, rows)))
    if not answer(found, as_json):
        show.agreement(found, out)


@app.command("tasks")
def data_tasks(
    data: DataFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; JSON.")],
    as_json: Json = False,
) -> None:
    """Write rows as tasks that Label Studio imports."""
    hush(as_json)
    from tunesmith.data.labels.tasks import write_tasks

    written = write_tasks(data, out)
    if not answer({"tasks": str(out), "rows": written}, as_json):
        print(f"Wrote {written} tasks to {out}. In Label Studio: Import; what people say comes back by Export, JSON.")
