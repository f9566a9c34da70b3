"""`tunesmith review`: a blind sheet of answers for people, and what they said of them."""

from __future__ import annotations

import csv
import io
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith import runs
from tunesmith.errors import DataError, RunError
from tunesmith.runs import Run, hash_json, json_line, read_json, read_jsonl, write_json, write_text

SIDES = ("baseline", "tuned")
CHOICES = {"a": "a", "b": "b", "tie": "tie", "=": "tie", "": ""}
SEED = 7


def sheet(
    names: Sequence[str], count: int, out: str | Path | None = None, runs_folder: str | Path | None = None
) -> dict[str, Any]:
    """Write sheet.csv, sheet.html and key.json (which answer is whose; not for reviewers).

    Args:
        names: one run (or the folder of an evaluation), whose tuned model is compared with its baseline; or several
            runs, whose tuned models are compared on the rows that all of them answered.
        count: so many rows, drawn by seed. Equal answers are ties and not asked.

    Raises:
        RunError: a run that is not evaluated. DataError: nothing to compare.
    """
    from tunesmith.evaluate.people import KEY, item_of
    from tunesmith.evaluate.report import environment

    models, answered = _answers(names, runs_folder)
    folder = _folder(names, out, runs_folder)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = random.Random(SEED).sample(range(len(answered)), min(count, len(answered)))
    items, key = [], {}
    for row in (answered[i] for i in sorted(drawn)):
        for pair in itertools.combinations(models, 2):
            answers = {model: row["answers"][model] for model in pair}
            item = item_of(row["prompt"], answers)
            same = len({text.strip() for text in answers.values()}) == 1
            a, b = pair if int(item, 16) % 2 else pair[::-1]
            key[item] = {"row": row["id"], "a": a, "b": b, "same": same}
            if not same:
                asked = "\n\n".join(m["content"] for m in row["prompt"] if m["role"] != "system")
                told = {"prompt": asked, "reference": row["reference"], "a": answers[a], "b": answers[b]}
                items.append({"item": item} | told)
    if not items:
        raise DataError("all answers are the same", where=", ".join(names), fix="There is nothing for people to judge.")
    random.Random(SEED).shuffle(items)
    earlier = read_json(folder / KEY)["items"] if (folder / KEY).is_file() else {}
    write_json(folder / KEY, {"models": models, "items": earlier | key})
    write_text(folder / "sheet.csv", _csv(items))
    page = environment().get_template("review.html.jinja").render(items=items, name=hash_json(sorted(key))[:12])
    write_text(folder / "sheet.html", page)
    return {
        "csv": str(folder / "sheet.csv"), "html": str(folder / "sheet.html"), "models": models, "pairs": len(items),
        "same_answers": sum(told["same"] for told in key.values()),
    }  # fmt: skip


def read(
    names: Sequence[str], files: Sequence[Path], out: str | Path | None = None, runs_folder: str | Path | None = None
) -> dict[str, Any]:
    """Take in filled sheets, a file a reviewer, beside those that were read earlier; returns what all of them come to.
    Of one run it goes into the scorecard, the gate and the report.

    Raises:
        RunError: there is no sheet yet. DataError: a file is no sheet, or a choice is none; names the line.
    """
    from tunesmith.evaluate.people import JUDGEMENTS, KEY, judged_pairs, summed_up

    folder = _folder(names, out, runs_folder)
    if not (folder / KEY).is_file():
        raise RunError("has no sheet yet", where=str(folder), fix=f"Make it: tunesmith review {' '.join(names)}")
    key = read_json(folder / KEY)
    said = {(line["item"], line["reviewer"]): line for line in read_jsonl(folder / JUDGEMENTS)}
    by: dict[str, Path] = {}
    for path in files:
        for line in _filled(path, key["items"]):
            if by.setdefault(line["reviewer"], path) != path:
                raise DataError(
                    f"'{line['reviewer']}' filled {by[line['reviewer']].name}, too",
                    where=path.name,
                    fix="Give each reviewer a name of their own: the column reviewer, or the file's name.",
                )
            said[line["item"], line["reviewer"]] = line
    write_text(folder / JUDGEMENTS, "".join(map(json_line, said.values())))
    if len(names) == 1:
        return _fold(_evaluated(names[0], runs_folder), folder)
    told = summed_up(list(judged_pairs(folder).values()), key["models"])
    write_json(folder / "results.json", told)
    return told


def _fold(run: Run, folder: Path) -> dict[str, Any]:
    """Put what people said into a run's scorecard, gate, JUnit XML and report."""
    from tunesmith.evaluate.conditions import decide
    from tunesmith.evaluate.junit import junit
    from tunesmith.evaluate.people import reviewed
    from tunesmith.evaluate.report import write_report

    with run.lock():
        stage = run.stage("evaluate")
        card = read_json(stage / "scorecard.json")
        told = reviewed(folder, read_jsonl(stage / "answers.jsonl"), stage / "judge.jsonl")
        if told is None:
            raise DataError(
                "no judgement is of the answers that the run gives now",
                where=str(folder),
                fix=f"Make a new sheet: tunesmith review {run.name}",
            )
        gate = card["gate"]
        card["review"] = told
        card["gate"] = decide([c["condition"] for c in gate["conditions"]], card, gate["enforced"])
        write_json(stage / "scorecard.json", card)
        write_text(stage / "junit.xml", junit(card["models"]["tuned"], card))
        manifest = run.manifest("evaluate")
        if manifest is not None:
            write_json(
                stage / "manifest.json",
                manifest | {"outputs": runs.outputs_of(stage, "."), "gate": card["gate"]["decision"]},
            )
        write_json(run.scorecard, card)
        write_report(run)
    return told | {"gate": card["gate"]["decision"]}


def _evaluated(name: str, runs_folder: str | Path | None) -> Run:
    """A run, or the folder of an evaluation of any two models."""
    beside = Run(Path(name))
    run = beside if (beside.stage("evaluate") / "answers.jsonl").is_file() else runs.get(name, runs_folder)
    if not (run.stage("evaluate") / "answers.jsonl").is_file():
        raise RunError("is not evaluated yet", where=str(run.path), fix="Evaluate it: tunesmith evaluate RECIPE")
    return run


def _folder(names: Sequence[str], out: str | Path | None, runs_folder: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    return _evaluated(names[0], runs_folder).review if len(names) == 1 else Path("review")


def _answers(names: Sequence[str], runs_folder: str | Path | None) -> tuple[list[str], list[dict[str, Any]]]:
    """The models, and the rows that all of them answered: {id, prompt, reference, answers by model}."""
    found = runs.told_apart([_evaluated(name, runs_folder) for name in names])
    lines = {name: read_jsonl(run.stage("evaluate") / "answers.jsonl") for name, run in found.items()}
    if len(found) == 1:
        models = list(SIDES)
        given = [(line, {side: line[side]["answer"] for side in SIDES}) for line in next(iter(lines.values()))]
    else:
        models = list(found)
        by = {name: {hash_json([x["prompt"], x["reference"]]): x for x in rows} for name, rows in lines.items()}
        shared = [key for key in by[models[0]] if all(key in rows for rows in by.values())]
        given = [(by[models[0]][key], {name: by[name][key]["tuned"]["answer"] for name in models}) for key in shared]
    if not given:
        raise DataError(
            "the runs share no test row", where=", ".join(found), fix="Compare runs that were tested on the same rows."
        )
    kept = ("id", "prompt", "reference")
    return models, [{k: line[k] for k in kept} | {"answers": answers} for line, answers in given]


def _csv(items: Sequence[dict[str, Any]]) -> str:
    """The sheet as a spreadsheet reads it; no cell of it is taken for a formula."""
    text = io.StringIO()
    columns = ["item", "prompt", "reference", "a", "b"]
    writer = csv.writer(text)
    writer.writerow([*columns, "choice", "comment", "reviewer"])
    for item in items:
        cells = [item[column] for column in columns]
        writer.writerow([*("'" + c if c[:1] in ("=", "+", "-", "@") else c for c in cells), "", "", ""])
    return text.getvalue()


def _filled(path: Path, items: dict[str, Any]) -> list[dict[str, Any]]:
    """What a filled sheet says: {item, reviewer, winner, comment}, a line each; empty choices are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't be read ({error})", where=str(path), fix="Save the sheet as CSV in UTF-8.") from error
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count))
    if not {"item", "choice"} <= set(reader.fieldnames or ()):
        raise DataError("lacks the columns item and choice", where=path.name, fix="Fill in the sheet that was made.")
    found = []
    try:
        lines = list(reader)
    except csv.Error as error:
        raise DataError(f"is no CSV ({error})", where=path.name, fix="Fill in the sheet that was made.") from error
    for number, row in enumerate(lines, 1):
        choice = CHOICES.get((row["choice"] or "").strip().lower())
        if row["item"] not in items or choice is None:
            what = f"'{row['choice']}' is no choice" if row["item"] in items else f"no pair is called '{row['item']}'"
            raise DataError(what, where=f"{path.name}, row {number}", fix="Choices are a, b and tie; items stay as is.")
        if choice:
            winner = "tie" if choice == "tie" else items[row["item"]][choice]
            who = (row.get("reviewer") or "").strip() or path.stem
            comment = (row.get("comment") or "").strip()
            found.append({"item": row["item"], "reviewer": who, "winner": winner, "comment": comment})
    return found
