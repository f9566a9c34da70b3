"""The verbs of the command line, a short function each, which imports what it needs inside."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith import __version__
from tunesmith.cli.options import Json, Nproc, RecipeName, RunName, Runs, Sets, answer, hush, main_rank
from tunesmith.errors import RunError

app = typer.Typer(
    name="tunesmith",
    help="Turn your own data into a better language model, and prove that it is better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _journey(
    recipe: str, sets: list[str] | None, runs: Path | None, as_json: bool, stages: tuple[str, ...], nproc: int = 1
) -> None:
    if nproc > 1:
        from tunesmith.train.launch import launch

        words = ["run" if "package" in stages else "train", recipe, *(w for s in sets or [] for w in ("--set", s))]
        launch(words + (["--runs", str(runs)] if runs else []) + (["--json"] if as_json else []), nproc)
        return
    hush(as_json)
    from tunesmith import pipeline, show

    result = pipeline.run(recipe, sets or [], runs, stages)
    if main_rank() and not answer(show.summary(result), as_json):
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
        return _golden(model or _run_of(recipe), suite, out, base, runs, as_json)
    if model is None:
        if recipe is None:
            raise RunError("nothing to evaluate", where="evaluate", fix="Give a RECIPE, or --model, --against, --data.")
        return _journey(recipe, sets, runs, as_json, ("evaluate",))
    if against is None or data is None:
        missing = "--against" if against is None else "--data"
        raise RunError(f"{missing} is missing", where="evaluate --model", fix="Give --against MODEL and --data FILE.")
    hush(as_json)
    from tunesmith import show, versus

    card = versus.evaluate(model, against, data, out, recipe, sets or [], base, runs)
    if not answer(card, as_json):
        show.scores(card, f"{model} against {against}", out / "report.html")
    return _exit_by_gate(card)


def _run_of(recipe: str | None) -> str | None:
    """The run of a recipe's file; another name as it is."""
    from tunesmith import recipe as recipes

    is_file = recipe is not None and Path(recipe).suffix in (".yaml", ".yml")
    return recipes.load(recipe)[0].name if recipe and is_file else recipe


def _golden(model: str | None, suite: Path, out: Path, base: str | None, runs: Path | None, as_json: bool) -> None:
    if model is None:
        raise RunError("which model?", where="evaluate --suite", fix="Give --model: a run or any model.")
    hush(as_json)
    from tunesmith import versus

    found = versus.golden(model, suite, out, base, runs)
    if not answer(found, as_json):
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
    if not answer({"suite": str(suite), "case": name}, as_json):
        print(f"Added {name} to {suite}. Check a model: tunesmith evaluate --model MODEL --suite {suite}")


@app.command()
def compare(
    names: Annotated[list[str], typer.Argument(metavar="RUN...", help="Evaluated runs; the first is compared with.")],
    metric: Annotated[str | None, typer.Option("--metric", help="What to rank by; the first run's goal.")] = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """A leaderboard of runs, on the test rows that all of them answered."""
    hush(as_json)
    from tunesmith import show
    from tunesmith.leaderboard import leaderboard

    found = leaderboard(names, metric, runs)
    if not answer(found, as_json):
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
    hush(as_json)
    from tunesmith import review as people
    from tunesmith import show

    if read:
        found = people.read(names, read, out, runs)
        if not answer(found, as_json):
            show.reviewed(found)
        return
    made = people.sheet(names, rows, out, runs)
    if not answer(made, as_json):
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
    hush(as_json)
    from tunesmith.starter import write_starter

    path, found = write_starter(data, out, force)
    if not answer({"recipe": str(path), **found}, as_json):
        wrong = f"; {found['unusable']} of them can't be used, check says which" if found["unusable"] else ""
        print(f"Wrote {path} ({found['rows']} rows{wrong}; layout {found['layout']}).\nNext: tunesmith check {path}")


@app.command()
def check(recipe: RecipeName, sets: Sets = None, as_json: Json = False) -> None:
    """Validate a recipe and every row without training; show what carries loss. Exit code 2 if a run would stop."""
    hush(as_json)
    from tunesmith import preview, show

    found = preview.check(recipe, sets or [])
    if not answer(found.as_dict(), as_json):
        show.check(found)
    if found.error is not None:
        if not as_json:
            print(f"A run would stop here: {found.error['what']}\n{found.error['fix']}", file=sys.stderr)
        sys.exit(2)


@app.command()
def plan(recipe: RecipeName, sets: Sets = None, as_json: Json = False) -> None:
    """Tell what training would take: parameters, steps, memory, time."""
    hush(as_json)
    from tunesmith import preview, show

    found = preview.plan(recipe, sets or [])
    if not answer(found.as_dict(), as_json):
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
    hush(as_json)
    from tunesmith import show
    from tunesmith.tune.search import tune as search

    found = search(recipe, sets or [], runs, space or [])
    if not answer(found, as_json):
        show.search(found)


@app.command()
def chat(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="A run; with --url, a model of that server.")
    ] = None,
    url: Annotated[str | None, typer.Option("--url", help="Talk with a server: http://127.0.0.1:8000.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="That server's key; TUNESMITH_KEY if not given.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer beside the tuned one's.")] = False,
    say: Annotated[str | None, typer.Option("--say", help="Say this, print the answer and end.")] = None,
    limit: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")] = 512,
    engine: Annotated[str, typer.Option("--engine", help="transformers, llamacpp, vllm or auto.")] = "transformers",
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Talk with a run's tuned model in the terminal, or with a server's."""
    hush(as_json)
    if url is not None:
        from tunesmith.cli.serving import talk_to

        return talk_to(url, run, key, say, limit, as_json)
    if run is None:
        raise RunError("with which run?", where="chat", fix="Give a RUN, or --url of a server.")
    from tunesmith.pipeline import open_run
    from tunesmith.talk import once, talk

    result = open_run(run, runs)
    if as_json or say is not None:
        text = say if say is not None else sys.stdin.read().strip()
        if not text:
            raise RunError("there is nothing to answer", where="--say", fix="Give it a text.")
        answers = once(result, text, base, limit, engine)
        if not answer(answers, as_json):
            print("\n".join(f"{side}: {a}" if base else a for side, a in answers.items() if side != "prompt"))
    else:
        talk(result, base, limit, engine)
    return None


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
    hush(as_json)
    from tunesmith import merging

    found = merging.merge(out, sources, weight or [], how, density, seed, runs)
    if not answer(found, as_json):
        print(
            f"Wrote {out}: {how} of {', '.join(f'{w:g} x {n}' for n, w in found['of'].items())}\n"
            f"Start from it: --set train.start_from={out} --set train.adapter.rank={found['rank']} "
            f"--set train.adapter.alpha={found['alpha']}"
        )


@app.command()
def doctor(as_json: Json = False) -> None:
    """Versions, cores, accelerators, memory, disk, and which extras are there."""
    hush(as_json)
    from tunesmith import doctor as check_up
    from tunesmith import show

    found = check_up.examine()
    if not answer(found, as_json):
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
