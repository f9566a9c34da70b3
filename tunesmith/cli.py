"""The command line: a short function per verb. Each imports what it needs inside, so that help answers at once."""

from __future__ import annotations

import io
import json
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tunesmith import __version__
from tunesmith.errors import RunError, TunesmithError, first_line

app = typer.Typer(
    name="tunesmith",
    help="Turn your own data into a better language model, and prove that it is better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
runs_app = typer.Typer(help="Look at runs, compare them, remove them.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")
data_app = typer.Typer(
    help="Prepare data without training, report on it, compare it, label it; see how far annotators agree.",
    no_args_is_help=True,
)
app.add_typer(data_app, name="data")

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one.")]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as train.epochs=1.")]
Runs = Annotated[Path | None, typer.Option("--runs", help="Where runs lie; TUNESMITH_RUNS or ./runs if not given.")]
Nproc = Annotated[int, typer.Option("--nproc", min=1, help="Processes that train together; train.parallel says how.")]
Json = Annotated[bool, typer.Option("--json", help="Answer with JSON, for programs.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name or folder.")]


def main() -> None:
    """Run the command line; an error of ours is a sentence and an exit code, never a traceback."""
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a row's text must not fail on a narrow terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(args=arguments, prog_name="tunesmith", standalone_mode=False)
    except TunesmithError as error:
        _fail(error, "--json" in arguments, debug)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except OSError as error:
        told = TunesmithError(
            f"{error.strerror or error}", where=str(error.filename or "system"), fix="--debug shows where."
        )
        _fail(told, "--json" in arguments, debug)
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # the command line itself was wrong
            error.show()
            sys.exit(error.exit_code)
        what = f"something went wrong that should not have ({type(error).__name__}: {first_line(error)})"
        fault = TunesmithError(what, fix="--debug shows where. Please report it.")
        fault.exit_code = 1
        _fail(fault, "--json" in arguments, debug)
    if code == 130 and _main_rank():
        print("Stopped. The same command does what is left.", file=sys.stderr)
    sys.exit(code or 0)


def _fail(error: TunesmithError, as_json: bool, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    from tunesmith.train.launch import hand_up

    if hand_up(error):
        sys.exit(error.exit_code)
    if as_json:
        print(json.dumps({"error": error.as_dict()}, ensure_ascii=False))
    else:
        from tunesmith.progress import console

        console().print("[bold red]Error[/bold red]", end=" ")
        console().print(str(error), markup=False, highlight=False, soft_wrap=True)
    sys.exit(error.exit_code)


def _main_rank() -> bool:
    from tunesmith.train.ranks import Ranks

    return Ranks.of_environment().main


def _answer(value: Any, as_json: bool) -> bool:
    """Print JSON where it was asked for."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False, indent=2, default=str))
    return as_json


def _hush(as_json: bool) -> None:
    if as_json:
        from tunesmith.progress import quiet

        quiet()


def _journey(
    recipe: str, sets: list[str] | None, runs: Path | None, as_json: bool, stages: tuple[str, ...], nproc: int = 1
) -> None:
    if nproc > 1:
        from tunesmith.train.launch import launch

        words = ["run" if "package" in stages else "train", recipe, *(w for s in sets or [] for w in ("--set", s))]
        launch(words + (["--runs", str(runs)] if runs else []) + (["--json"] if as_json else []), nproc)
        return
    _hush(as_json)
    from tunesmith import pipeline, show

    result = pipeline.run(recipe, sets or [], runs, stages)
    if _main_rank() and not _answer(show.summary(result), as_json):
        show.ending(result)
    if "evaluate" in stages:
        _exit_by_gate(result.scorecard)


def _exit_by_gate(card: dict[str, Any] | None) -> None:
    """Exit code 3 where a recipe's gate holds the model, 4 where it is not proven."""
    gate = (card or {}).get("gate") or {}
    if gate.get("enforced") and gate["decision"] != "ship":
        raise typer.Exit({"hold": 3, "not_proven": 4}[gate["decision"]])


@app.command()
def run(recipe: RecipeName, sets: Sets = None, runs: Runs = None, nproc: Nproc = 1, as_json: Json = False) -> None:
    """Walk a recipe's whole journey: data, train, evaluate, package. What is up to date is skipped."""
    _journey(recipe, sets, runs, as_json, ("data", "train", "evaluate", "package"), nproc)


@app.command()
def train(recipe: RecipeName, sets: Sets = None, runs: Runs = None, nproc: Nproc = 1, as_json: Json = False) -> None:
    """Prepare the data and train, and nothing after that."""
    _journey(recipe, sets, runs, as_json, ("data", "train"), nproc)


@app.command()
def evaluate(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="A recipe; with --model, only its settings are taken.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="A hub id, folder, .gguf file, run, adapter, or http://host/v1#name.")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="The baseline: another such name.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="A file of test rows.")] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base of an adapter that names none.")] = None,
    suite: Annotated[Path | None, typer.Option("--suite", help="Golden cases that --model must pass.")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the report goes.")] = Path("evaluation"),
    sets: Sets = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Compare a trained run with its base on the test rows; or, with --model, any two models on a file's rows.

    Exit code 3 where the recipe's gate holds the model, 4 where it is not proven.
    """
    if suite is not None:
        return _golden(model or recipe, suite, out, base, runs, as_json)
    if model is None:
        if recipe is None:
            raise RunError("nothing to evaluate", where="evaluate", fix="Give a RECIPE, or --model, --against, --data.")
        return _journey(recipe, sets, runs, as_json, ("evaluate",))
    if against is None or data is None:
        missing = "--against" if against is None else "--data"
        raise RunError(f"{missing} is missing", where="evaluate --model", fix="Give --against MODEL and --data FILE.")
    _hush(as_json)
    from tunesmith import show, versus

    card = versus.evaluate(model, against, data, out, recipe, sets or [], base, runs)
    if not _answer(card, as_json):
        show.scores(card, f"{model} against {against}", out / "report.html")
    return _exit_by_gate(card)


def _golden(model: str | None, suite: Path, out: Path, base: str | None, runs: Path | None, as_json: bool) -> None:
    if model is None:
        raise RunError("which model?", where="evaluate --suite", fix="Give --model: a run or any model.")
    _hush(as_json)
    from tunesmith import versus

    found = versus.golden(model, suite, out, base, runs)
    if not _answer(found, as_json):
        for case in found["cases"]:
            print(
                f"{'passed' if case['passed'] else 'FAILED'}  {case['name']}"
                + ("" if case["passed"] else f": {case['why']}")
            )
    if not found["passed"]:
        raise typer.Exit(3)


@app.command()
def golden(
    run: RunName,
    row: Annotated[str, typer.Argument(metavar="ROW", help="A row's id, as the report shows it.")],
    suite: Annotated[Path, typer.Option("--suite", help="The suite's file.")] = Path("suite.yaml"),
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Add a row of a run's report to a suite of golden cases (evaluate --suite)."""
    from tunesmith import versus

    name = versus.add_golden(run, row, suite, runs)
    if not _answer({"suite": str(suite), "case": name}, as_json):
        print(f"Added {name} to {suite}. Check a model: tunesmith evaluate --model {run} --suite {suite}")


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Evaluated runs; the first is compared with.")],
    metric: Annotated[str | None, typer.Option("--metric", help="What to rank by; the first run's goal.")] = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """A leaderboard of runs, on the test rows that all of them answered."""
    _hush(as_json)
    from tunesmith import show, versus

    found = versus.leaderboard(names, metric, runs)
    if not _answer(found, as_json):
        show.leaderboard(found)


@app.command()
def review(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="One evaluated run, or several to compare.")],
    read: Annotated[list[Path] | None, typer.Option("--read", help="A filled sheet, one for each reviewer.")] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows in the sheet.")] = 50,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The folder; the run's, or ./review.")] = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Make a blind sheet of answers (CSV and HTML) for people; with --read, take in what they said."""
    _hush(as_json)
    from tunesmith import review as people
    from tunesmith import show

    if read:
        found = people.read(names, read, out, runs)
        if not _answer(found, as_json):
            show.reviewed(found)
        return
    made = people.sheet(names, rows, out, runs)
    if not _answer(made, as_json):
        print(
            f"Wrote {made['html']} and {made['csv']}: {made['pairs']} pairs of {', '.join(made['models'])}. "
            f"Send one of them to reviewers.\nThen: tunesmith review {' '.join(names)} --read FILE --read FILE"
        )


@app.command()
def package(
    recipe: RecipeName,
    force: Annotated[bool, typer.Option("--force", help="Package what the gate holds, too; it is recorded.")] = False,
    sets: Sets = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Merge a trained run's adapter into its base, check that, and write the model card."""
    _journey(recipe, [*(sets or []), *(["package.force=true"] if force else [])], runs, as_json, ("package",))


@app.command()
def init(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Your data file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where to write the recipe; NAME.yaml if not given.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a commented starter recipe for a data file, its columns detected."""
    _hush(as_json)
    from tunesmith.starter import write_starter

    path, found = write_starter(data, out, force)
    if not _answer({"recipe": str(path), **found}, as_json):
        wrong = f"; {found['unusable']} of them can't be used, check says which" if found["unusable"] else ""
        print(f"Wrote {path} ({found['rows']} rows{wrong}; layout {found['layout']}).\nNext: tunesmith check {path}")


@app.command()
def check(recipe: RecipeName, sets: Sets = None, as_json: Json = False) -> None:
    """Validate a recipe and every row without training; show what carries loss. Exit code 2 if a run would stop."""
    _hush(as_json)
    from tunesmith import preview, show

    found = preview.check(recipe, sets or [])
    if not _answer(found.as_dict(), as_json):
        show.check(found)
    if found.error is not None:
        if not as_json:
            print(f"A run would stop here: {found.error['what']}\n{found.error['fix']}", file=sys.stderr)
        sys.exit(2)


@app.command()
def plan(recipe: RecipeName, sets: Sets = None, as_json: Json = False) -> None:
    """Tell what training would take: parameters, steps, memory, time."""
    _hush(as_json)
    from tunesmith import preview, show

    found = preview.plan(recipe, sets or [])
    if not _answer(found.as_dict(), as_json):
        show.plan(found)


@app.command()
def tune(
    recipe: RecipeName,
    space: Annotated[
        list[str] | None,
        typer.Option("--space", metavar="KEY=VALUES", help="What may change, as train.learning_rate=1e-4..1e-2."),
    ] = None,
    sets: Sets = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Search for better settings in many short trainings; keep the best as a recipe. Goes on where it stopped."""
    _hush(as_json)
    from tunesmith import show
    from tunesmith.tune.search import tune as search

    found = search(recipe, sets or [], runs, space or [])
    if not _answer(found, as_json):
        show.search(found)


@app.command()
def chat(
    run: RunName,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer beside the tuned one's.")] = False,
    say: Annotated[str | None, typer.Option("--say", help="Say this, print the answer and end.")] = None,
    limit: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 512,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Talk with a run's tuned model in the terminal."""
    _hush(as_json)
    from tunesmith.pipeline import open_run
    from tunesmith.talk import once, talk

    result = open_run(run, runs)
    if as_json or say is not None:
        text = say if say is not None else sys.stdin.read().strip()
        if not text:
            raise RunError("there is nothing to answer", where="--say", fix="Give it a text.")
        answers = once(result, text, base, limit)
        if not _answer(answers, as_json):
            print("\n".join(f"{side}: {a}" if base else a for side, a in answers.items() if side != "prompt"))
    else:
        talk(result, base, limit)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write the merged adapter to.")],
    sources: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Runs, or folders with an adapter.")],
    weight: Annotated[list[float] | None, typer.Option("--weight", help="One for each; the same for all.")] = None,
    how: Annotated[str, typer.Option("--how", help="svd, cat, linear, ties, dare-linear, dare-ties.")] = "svd",
    density: Annotated[float, typer.Option("--density", min=0, max=1, help="What ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Of what dare leaves out.")] = 7,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Merge LoRA adapters of one base into one; train.start_from takes it, with train.max_steps 0 as it is."""
    _hush(as_json)
    from tunesmith import merging

    found = merging.merge(out, sources, weight or [], how, density, seed, runs)
    if not _answer(found, as_json):
        print(
            f"Wrote {out} (rank {found['rank']}): {how} of {', '.join(f'{w:g} x {n}' for n, w in found['of'].items())}"
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, cores, accelerators, memory, disk, and which extras are there."""
    _hush(as_json)
    from tunesmith import doctor as check_up
    from tunesmith import show

    found = check_up.examine()
    if not _answer(found, as_json):
        show.doctor(found)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the recipe's JSON schema, for editors."""
    from tunesmith.recipe import schema as recipe_schema

    print(json.dumps(recipe_schema(), indent=2))


@app.command()
def version(as_json: Json = False) -> None:
    """Print the version."""
    print(json.dumps({"version": __version__}) if as_json else __version__)


@data_app.command("prepare")
def data_prepare(
    recipe: RecipeName,
    sets: Sets = None,
    runs: Runs = None,
    dvc: Annotated[bool, typer.Option("--dvc", help="Write data.dvc beside it, for teams that use DVC.")] = False,
    as_json: Json = False,
) -> None:
    """Read, clean and split a recipe's rows, and nothing after that."""
    _hush(as_json)
    from tunesmith import sets as prepared
    from tunesmith import show

    found = prepared.prepare(recipe, sets or [], runs, dvc)
    if not _answer(found.as_dict(), as_json):
        show.prepared(found)


@data_app.command("report")
def data_report(
    name: Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, which is prepared first, or a run.")],
    sets: Sets = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """One page on a prepared set: counts, lengths, labels, privacy, contamination, and what to fix first."""
    _hush(as_json)
    from tunesmith import sets as prepared
    from tunesmith import show

    page, found = prepared.report(name, sets or [], runs)
    if not _answer(found | {"page": str(page)}, as_json):
        show.data_report(page, found)


@data_app.command("diff")
def data_diff(
    old: Annotated[str, typer.Argument(metavar="A", help="A run, or a folder with prepared rows.")],
    new: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """What changed from one prepared set to another: rows, lengths, labels."""
    _hush(as_json)
    from tunesmith import sets as prepared
    from tunesmith import show

    found = prepared.diff(old, new, runs)
    if not _answer(found, as_json):
        show.data_diff(found)


@runs_app.command("list")
def runs_list(runs: Runs = None, as_json: Json = False) -> None:
    """All runs, newest last, with their verdicts."""
    from tunesmith import show
    from tunesmith.runs import every

    found = [show.line(r) for r in every(runs)]
    if not _answer(found, as_json):
        show.table(found, "No runs here yet. Make one: tunesmith run quickstart")


@runs_app.command("show")
def runs_show(run: RunName, runs: Runs = None, as_json: Json = False) -> None:
    """One run: its stages, scores and files."""
    from tunesmith import show
    from tunesmith.pipeline import open_run

    result = open_run(run, runs)
    if not _answer(show.summary(result), as_json):
        show.stages(result)
        show.ending(result)


@runs_app.command("diff")
def runs_diff(run: RunName, other: RunName, runs: Runs = None, as_json: Json = False) -> None:
    """What differs between two runs: recipe, versions, scores."""
    from tunesmith import show
    from tunesmith.runs import get

    found = show.differences(get(run, runs), get(other, runs))
    if not _answer(found, as_json):
        show.table(found, "The two runs do not differ.")


@runs_app.command("rm")
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
    if not _answer({"removed": str(found.path)}, as_json):
        print(f"Removed {found.path}")


DataFile = Annotated[Path, typer.Argument(metavar="DATA", help="A file of rows, of any format that is read.")]
OutFile = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; JSONL.")]


@data_app.command("label")
def data_label(
    rules: Annotated[Path, typer.Argument(metavar="RULES", help="A Python file of functions: row -> label or None.")],
    data: DataFile,
    out: OutFile = None,
    truth: Annotated[str | None, typer.Option("--truth", help="A column of right labels, to measure with.")] = None,
    as_json: Json = False,
) -> None:
    """Label rows by rules that vote; a label model weighs them by how they agree. Runs the Python file."""
    _hush(as_json)
    from tunesmith import show
    from tunesmith.data.labels.weak import label
    from tunesmith.runs import json_line, write_text

    found = label(rules, data, truth)
    if out is not None:
        write_text(out, "".join(map(json_line, found.rows)))
    told = found.facts | {"rules": found.rules, "unlabelled": found.unlabelled, "broken": found.broken}
    if not _answer(told, as_json):
        show.labelled(found, out)


@data_app.command("agreement")
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
    _hush(as_json)
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
    if not _answer(found, as_json):
        show.agreement(found, out)


@data_app.command("tasks")
def data_tasks(
    data: DataFile,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write; JSON.")],
    as_json: Json = False,
) -> None:
    """Write rows as tasks that Label Studio imports."""
    _hush(as_json)
    from tunesmith.data.labels.tasks import write_tasks

    written = write_tasks(data, out)
    if not _answer({"tasks": str(out), "rows": written}, as_json):
        print(f"Wrote {written} tasks to {out}. In Label Studio: Import; what people say comes back by Export, JSON.")
