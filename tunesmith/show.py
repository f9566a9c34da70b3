"""What commands print for people. What they print for programs comes from the same values."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tunesmith.errors import RunError, first_line
from tunesmith.runs import STAGES, Run, read_jsonl, runs_folder, told_apart
from tunesmith.scores import bracketed, doubt, number, signed, spanned

if TYPE_CHECKING:
    from tunesmith.models.plan import Plan
    from tunesmith.pipeline import Result
    from tunesmith.preview import Check
    from tunesmith.sets import Prepared

SAID = {
    "better": "[bold green]better[/bold green]: the whole interval of the difference is on the good side of zero",
    "worse": "[bold red]worse[/bold red]: the whole interval of the difference is on the bad side of zero",
    "not_proven": "[bold yellow]not proven[/bold yellow]: the difference's interval holds zero, or takes more rows",
}
LISTED_AT_MOST = 20


def _console() -> Console:
    return Console(emoji=False)  # :x: in a name is no picture


def summary(result: Result) -> dict[str, Any]:
    """A run as a program wants it."""
    run = result.run
    return {
        "run": run.name,
        "path": str(run.path),
        "stages": {s: "complete" if run.complete(s) else "missing" for s in STAGES},
        "scorecard": result.scorecard,
        "data": (run.complete("data") or {}).get("counts"),
        "train": (run.complete("train") or {}).get("summary"),
        "findings": read_jsonl(run.findings),
        "package": (run.complete("package") or {}).get("check"),
        "forced": "forced" in (run.complete("package") or {}),
        "report": str(run.report) if run.report.is_file() else None,
        "adapter": str(run.tuned) if run.tuned.is_dir() else None,
        "model": str(run.model) if run.complete("package") else None,
    }


def stages(result: Result) -> None:
    """What each stage made, and when."""
    made = Table(*("stage", "state", "seconds", "made"), title=str(result.path), title_justify="left")
    for stage in STAGES:
        manifest = result.run.complete(stage)
        if manifest is None:
            made.add_row(stage, "missing", "", "")
            continue
        told = manifest.get("counts") or manifest.get("summary") or manifest.get("check") or manifest.get("verdict", "")
        facts = {k: v for k, v in told.items() if isinstance(v, int | float)} if isinstance(told, dict) else {}
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in facts.items())
        made.add_row(stage, "complete", f"{manifest['seconds']:.0f}", Text(shown or str(told)))
    out = _console()
    out.print(made)
    for found in read_jsonl(result.run.findings):
        where = f" Rows: {', '.join(found['rows'][:5])}." if found["rows"] else ""
        out.print(
            f"Noticed at step {found['step']} ({found['kind']}): {found['what']}.{where} {found['fix']}", markup=False
        )


def scores(card: dict[str, Any], title: str, report: Path) -> None:
    """A scorecard's metrics, its verdict, and what its gate says."""
    out = _console()
    table = Table(title=f"{title}: {card['n']} held-out row{'s' * (card['n'] != 1)}", title_justify="left")
    table.add_column("metric")
    for column in ("baseline", "tuned", "difference", "95% interval"):
        table.add_column(column, justify="right")
    goal = card["goal_metric"]
    rows = [(f"[bold]{name}[/bold] (goal)" if name == goal else name, score) for name, score in card["metrics"].items()]
    rows += [(f"{goal}, {escape(tag)} ({own[goal]['n']})", own[goal]) for tag, own in card.get("tasks", {}).items()]
    for name, score in rows:
        gap = score["difference"]
        table.add_row(
            name,
            number(score["baseline"]["value"]),
            number(score["tuned"]["value"]),
            f"{'+' if gap['value'] >= 0 else ''}{number(gap['value'])}",
            bracketed(gap),
        )
    out.print(table)
    _besides(card)
    out.print(f"Verdict on {card['goal_metric']}: {SAID[card['verdict']]}.")
    failed = {side: sum(n.values()) for side, n in card.get("failures", {}).items() if n}
    for side, n in failed.items():
        out.print(f"{n} answers of the {side} model failed; they count as wrong.", highlight=False)
    gate = card.get("gate")
    if gate and gate["enforced"]:
        out.print(f"Gate: [bold]{gate['decision'].replace('_', ' ')}[/bold]", highlight=False)
        for condition in gate["conditions"]:
            mark = {"met": "met", "broken": "broken", "not_proven": "not proven"}[condition["state"]]
            told = f"  {condition['condition']}: {mark} ({condition['why']})"
            out.print(told, markup=False, highlight=False, soft_wrap=True)
    out.print(f"Report: {report}", highlight=False, soft_wrap=True)


def _besides(card: dict[str, Any]) -> None:
    """What a scorecard holds besides metrics, by the names that a gate's conditions give it."""
    from tunesmith.evaluate.conditions import scores_in

    table = Table(title_justify="left")
    table.add_column("measured besides", overflow="fold")
    for column in ("baseline", "tuned", "difference", "95% interval"):
        table.add_column(column, justify="right")
    for path, score in scores_in(card):
        if len(path) == 1 or "by_kind" in path:
            continue
        paired = "difference" in score
        one, span = (score["tuned"], score["difference"]) if paired else (score, score)
        before, gap = (number(score["baseline"]["value"]), signed(span["value"])) if paired else ("", "")
        table.add_row(escape(".".join(path)), before, number(one["value"]), gap, bracketed(span))
    if table.row_count:
        _console().print(table)


def leaderboard(found: dict[str, Any]) -> None:
    """Runs by rank."""
    title = f"{found['metric']} on {found['n']} rows, each against {found['against']}"
    board = Table("run", "score", "difference", "p (Holm)", "verdict", title=title, title_justify="left")
    for row in found["runs"]:
        gap = row.get("difference")
        board.add_row(
            row["run"],
            Text(spanned(row["score"])),
            Text(spanned(gap) if gap else ""),
            f"{gap['p_holm']:.3f}" if gap else "",
            row.get("verdict", ""),
        )
    _console().print(board)


def reviewed(found: dict[str, Any]) -> None:
    """What people prefer, and how far they agree."""
    out = _console()
    who = ", ".join(f"{name} ({n})" for name, n in found["reviewers"].items())
    out.print(
        f"{found['judgements']} judgements by {who}; {found['same_answers']} pairs are the same.", highlight=False
    )
    table = Table("score", "value", "n", title="What people prefer", title_justify="left")
    scores = {"preference (the tuned model's share)": found["preference"]} if "preference" in found else {}
    scores |= {f"strength of {model} (Bradley-Terry)": score for model, score in found["strength"].items()}
    scores |= {f"agreement: {name}": score for name, score in found["agreement"].items()}
    for name, score in scores.items():
        table.add_row(name, Text(spanned(score)), str(score["n"]))
    out.print(table)
    if "gate" in found:
        out.print(f"Gate: [bold]{found['gate'].replace('_', ' ')}[/bold]", highlight=False)


def ending(result: Result) -> None:
    """The verdict, where the report lies, and what to try next."""
    out, run, card = _console(), result.run, result.scorecard
    if card is None:
        out.print(f"Run [bold]{run.name}[/bold] in {run.path}: not evaluated yet.")
        from tunesmith.claims import origin_of

        stage = "evaluate" if run.complete("train") else "run"
        out.print(f"Next: {program()} {stage} {origin_of(run)}", markup=False, highlight=False, soft_wrap=True)
        return
    scores(card, run.name, run.report)
    if run.complete("package"):
        out.print(f"Model:  {run.model}", highlight=False, soft_wrap=True)
    out.print("Next:", highlight=False)
    name = run.name if runs_folder() / run.name == run.path else run.path
    talks = () if _only_scores(run) else ((f"chat {name} --base", "talk with it, the base beside it"),)
    for command, why in (
        *talks,
        (f"runs show {name}", "its stages and figures"),
        ("init YOUR-DATA.jsonl", "the same with your own rows"),
    ):
        out.print(f"  {program()} {command:<38} {why}", markup=False, highlight=False, soft_wrap=True)


def _only_scores(run: Run) -> bool:
    """Whether the tuned model is a reward model, which gives no answers."""
    from tunesmith.models.load import classes_of

    return len(classes_of(run.tuned)) == 1


def program() -> str:
    """How this program is called from here: by name where the shell finds it, else by its path."""
    if shutil.which("tunesmith"):
        return "tunesmith"
    here = Path(sys.argv[0])
    return os.path.relpath(here) if here.is_absolute() else str(here)


def check(found: Check) -> None:
    """Counts, what was left out and why, and three rows with their loss coloured."""
    from tunesmith.journey import describe_counts

    out = _console()
    out.print(describe_counts(found.counts), highlight=False)
    out.print(f"Answers: {found.answers}", highlight=False)
    for title, rows in (("Left out", found.left_out), ("Cut to fit", found.cut)):
        if not rows:
            continue
        table = Table(*rows[0], title=f"{title}: {len(rows)}", title_justify="left")
        for row in rows[:LISTED_AT_MOST]:
            table.add_row(*map(Text, row.values()))
        out.print(table)
        more = len(rows) - LISTED_AT_MOST
        if more > 0:
            out.print(f"and {more} more (all of them with --json)")
    out.print("As the model sees them ([green]green[/green]: carries loss):")
    for tokens in found.shown:
        line = Text()
        for token, weight in tokens:
            line.append(token, style="black on green" if weight else "dim")
        out.print(line)
        carrying = sum(1 for _, weight in tokens if weight)
        out.print(f"{len(tokens)} tokens, {carrying} with loss\n", highlight=False)


def plan(found: Plan) -> None:
    out = _console()
    table = Table(show_header=False)
    share = found.trained_parameters / found.parameters
    table.add_row("parameters", f"{found.parameters:,}, {found.trained_parameters:,} trained ({share:.1%})")
    table.add_row("rows, tokens", f"{found.rows:,} rows, {found.tokens:,} tokens in {found.steps:,} steps")
    table.add_row("precision", f"{found.precision} base; what is trained is float32")
    table.add_row("time", f"about {_duration(found.seconds)} of training")
    table.add_row(
        "peak memory", f"about {found.peak_bytes / 2**30:.1f} GiB of {found.available_bytes / 2**30:.1f} free"
    )
    for part, size in found.memory.items():
        table.add_row(f"  {part}", f"{size / 2**20:,.0f} MiB")
    out.print(table)
    if not found.fits:
        from tunesmith.models.plan import told

        out.print(f"It does not fit. {told(found.changes)}", markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def line(run: Run) -> dict[str, Any]:
    """A run in a list; one whose files are damaged says so, and hides no other."""
    try:
        stages, card = " ".join(s for s in STAGES if run.complete(s)), run.scores
        goal = card["metrics"][card["goal_metric"]] if card else None
    except (RunError, KeyError, TypeError) as error:
        damaged = dict.fromkeys(("verdict", "goal", "baseline", "tuned"), "-")
        return {"run": run.name, "stages": f"damaged: {first_line(error)}"} | damaged
    return {
        "run": run.name,
        "stages": stages or "none finished",
        "verdict": card["verdict"] if card else "-",
        "goal": card["goal_metric"] if card else "-",
        "baseline": spanned(goal["baseline"]) if goal else "-",
        "tuned": spanned(goal["tuned"]) if goal else "-",
    }


def differences(one: Run, other: Run) -> list[dict[str, str]]:
    """Recipe keys, versions and scores in which two runs differ."""
    from tunesmith.recipe import kept

    named, sides = told_apart([one, other]), []
    for run in named.values():
        flat = _flat(kept(run))
        manifest = run.manifest() or {}
        flat |= {f"version of {k}": v for k, v in manifest.get("versions", {}).items()}
        card = run.scores
        if card:
            flat |= {"verdict": card["verdict"]} | {m: spanned(s["tuned"]) for m, s in card["metrics"].items()}
        sides.append(flat)
    first, second = sides
    keys = [k for k in dict.fromkeys([*first, *second]) if k != "name" and first.get(k) != second.get(k)]
    return [{"what": k} | {name: str(side.get(k, "-")) for name, side in zip(named, sides, strict=True)} for k in keys]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = {str(i): v for i, v in enumerate(value)}.items()
    else:
        return {path: value}
    return {k: v for key, inner in pairs for k, v in _flat(inner, f"{path}.{key}" if path else str(key)).items()}


def table(rows: list[dict[str, Any]], empty: str) -> None:
    out = _console()
    if not rows:
        out.print(empty, markup=False)
        return
    shown = Table(*rows[0].keys())
    for row in rows:
        shown.add_row(*(Text(str(v)) for v in row.values()))
    out.print(shown)


def labelled(found: Any, written: Path | None) -> None:
    """What rules made of a file: a data.labels.weak.Labelled."""
    facts = found.facts
    table(found.rules, "No rules.")
    print(f"{facts['labelled']} of {facts['rows']} rows labelled, by {facts['model']}.")
    if "accuracy" in facts:
        print(f"Of {facts['checked']} whose label is known, {facts['accuracy']:.1%} are right.")
    if found.broken:
        print(f"{len(found.broken)} rows can't be read, the first is row {found.broken[0][0]}: {found.broken[0][1]}.")
    print(f"Wrote {written}" if written else "Nothing was written; --out names a file.")


def agreement(found: dict[str, Any], written: Path | None) -> None:
    """Annotators' agreement, as data.labels.agreement tells it."""
    alpha, fleiss, cohen = found["krippendorff"], found["fleiss"], found["cohen"]

    def of(score: dict[str, Any], more: str = "") -> str:
        span = ", 95% interval {} to {}".format(*score["interval"]) if score["interval"] else ""
        return f"{score['items']} items{more}{span}{doubt(score)}"

    figures = [
        ("Krippendorff's alpha", alpha["alpha"], of(alpha)),
        ("Fleiss' kappa", fleiss["kappa"], of(fleiss, f", {fleiss['raters']} judgements each")),
        ("Cohen's kappa, mean", cohen["mean"], f"{len(cohen['pairs'])} pairs of annotators"),
        *(
            (f"Cohen's kappa, {' and '.join(pair['annotators'])}", pair["kappa"], of(pair))
            for pair in cohen["pairs"][:LISTED_AT_MOST]
        ),
        ("agreeing pairs", found["agreeing pairs"], f"{found['judgements']} judgements"),
    ]
    table([dict(zip(("figure", "value", "of"), line, strict=True)) for line in figures], "")
    divided = found["disagreements"]
    print(f"{len(divided)} of {found['items judged by two or more']} items are judged differently; most divided:")
    for one in divided[:5]:
        print(f"  {one['item']}: " + ", ".join(f"{label} ({n})" for label, n in one["votes"].items()))
    if "adjudicated" in found:
        print(f"{found['adjudicated']['rows']} items adjudicated; {found['adjudicated']['ties']} ties have no label.")
        print(f"Wrote {written}" if written else "Nothing was written; --out names a file.")


def doctor(found: dict[str, Any]) -> None:
    shown = Table(show_header=False)
    for key, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            value = "\n".join(map(str, value)) or "none"
        shown.add_row(key, Text(str(value)))
    _console().print(shown)


def search(found: dict[str, Any]) -> None:
    """The trials of a search, the best marked, and the recipe that it made."""
    best = found["best"]
    names = list(best["settings"])
    shown = Table("trial", "state", found["metric"], *names)
    for trial in found["trials"]:
        mark = " (best)" if trial["trial"] == best["trial"] else ""
        value = "-" if trial["value"] is None else f"{trial['value']:.4f}"
        settings = (Text(f"{trial['settings'].get(name, '-')}") for name in names)
        shown.add_row(trial["trial"] + mark, trial["state"], value, *settings)
    out = _console()
    out.print(shown)
    out.print(f"The best one's recipe: {found['recipe']}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"Next: {program()} run {found['recipe']}", markup=False, highlight=False, soft_wrap=True)


def prepared(found: Prepared) -> None:
    """Counts, the version, and where the rows lie."""
    from tunesmith.journey import describe_counts

    out = _console()
    out.print(describe_counts(found.manifest["counts"]), highlight=False)
    out.print(f"Version {found.manifest['version']} in {found.folder}", highlight=False, soft_wrap=True)
    if found.dvc:
        out.print(f"For DVC: {found.dvc} (dvc commit {found.dvc.name})", highlight=False, soft_wrap=True)
    out.print(f"Next: {program()} data report {found.run.path}", markup=False, highlight=False, soft_wrap=True)


def data_report(page: Path, found: dict[str, Any]) -> None:
    """What to fix first, and where the page lies."""
    out = _console()
    for place, one in enumerate(found["fix first"], 1):
        out.print(f"{place}. {one['what']}. {one['do']}", markup=False, highlight=False, soft_wrap=True)
    if not found["fix first"]:
        out.print("Nothing stands out.")
    out.print(f"Report: {page}", highlight=False, soft_wrap=True)


def data_diff(found: dict[str, Any]) -> None:
    """Rows added, removed and changed; shifts in length and labels."""
    out = _console()
    rows = found["rows"]
    numbers = ", ".join(f"{found[what]['rows']} {what}" for what in ("added", "removed", "changed"))
    out.print(
        f"{rows['old']} rows became {rows['new']}: {found['same']} the same "
        f"({found['other part']} of them in another part), {numbers}",
        highlight=False,
        soft_wrap=True,
    )
    for side, shift in found["lengths"].items():
        if shift:
            out.print(
                f"{side}: {shift['old mean']:.1f} characters on average, now {shift['new mean']:.1f} "
                f"(Kolmogorov-Smirnov distance {shift['distance']:.3f}, p {shift['p']:.2g})",
                highlight=False,
            )
    for label, share in list(found["labels"].items())[:LISTED_AT_MOST]:
        if share["old"] != share["new"]:
            out.print(
                f"label {label}: {share['old']:.1%} of rows, now {share['new']:.1%}", markup=False, highlight=False
            )
    for what in ("added", "removed"):
        for one in found[what]["such as"]:
            text = one["text"].replace("\n", " ")
            out.print(f"{what} {one['row']}: {text}", markup=False, highlight=False, soft_wrap=True)
    for one in found["changed"]["such as"]:
        out.print(f"changed {one['row']}:\n  - {one['old']}\n  + {one['new']}", markup=False, highlight=False)
