"""People judge a blind sheet: what they say comes back, equals other libraries' figures, and decides with the gate."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_recipe
from tests.test_report import fake_run
from tunesmith import review, runs
from tunesmith.errors import DataError, RunError
from tunesmith.evaluate.people import strengths


def test_bradley_terry_is_the_likeliest() -> None:
    """Against scikit-learn's logistic regression of (one wins) on (one - other), with the same half wins added."""
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(1)
    truth = np.array([0.0, 0.5, -0.7, 1.2])
    wins = np.zeros((4, 4))
    for _ in range(300):
        i, j = random.choice(4, 2, replace=False)
        won = random.random() < 1 / (1 + np.exp(truth[j] - truth[i]))
        wins[(i, j) if won else (j, i)] += 1
    x, y, w = [], [], []
    for i in range(4):
        for j in range(4):
            if i != j:
                x.append(np.eye(4)[i] - np.eye(4)[j])
                y.append(1)
                w.append(wins[i, j] + 0.5)
    x += [-row for row in x]
    y += [0] * len(y)
    w += w
    fitted = LogisticRegression(C=1e9, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(x, y, sample_weight=w)
    theirs = fitted.coef_[0] - fitted.coef_[0][0]
    assert strengths(wins.ravel(), 4) == pytest.approx(theirs, abs=1e-4)


class Sheet(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.items: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        if tag == "fieldset":
            self.items.append(told["data-item"] or "")
        self.loads += [str(told[name]) for name in ("src", "href") if told.get(name)]


def evaluated(folder: Path) -> runs.Run:
    run = fake_run(folder / "runs", tuned_right=24)
    run.origin.write_text("{}")
    return run


def fill(sheet: Path, to: Path, choose: Any, **more: str) -> Path:
    with sheet.open(newline="") as file:
        lines = list(csv.DictReader(file))
    with to.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["item", "choice", "comment", *more], delimiter=";")
        writer.writeheader()
        for line in lines:
            writer.writerow({"item": line["item"], "choice": choose(line), "comment": "", **more})
    return to


def test_a_sheet_is_blind_and_what_people_say_decides(tunesmith: Any, tmp_path: Path) -> None:
    run = evaluated(tmp_path)
    card = runs.read_json(run.stage("evaluate") / "scorecard.json")
    made = tunesmith("review", "desk", "--rows", "30", "--json").json
    folder = tmp_path / "runs/desk/review"
    with (folder / "sheet.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    page = Sheet(folder / "sheet.html")
    assert page.items == [line["item"] for line in lines] and len(lines) == made["pairs"] == 30
    assert not page.loads and "<script>alert" not in (folder / "sheet.html").read_text()
    for name in ("sheet.csv", "sheet.html"):
        text = (folder / name).read_text()
        assert "baseline" not in text and "tuned" not in text.replace("&#34;tuned&#34;", "").replace('""tuned""', "")
    key = runs.read_json(folder / "key.json")["items"]
    assert 5 < sum(told["a"] == "tuned" for told in key.values()) < 25  # the place tells nothing

    def right(line: dict[str, str]) -> str:  # who prefers the answer that equals the reference
        return "A" if line["a"] == line["reference"] else "b" if line["b"] == line["reference"] else "Tie"

    def lazy(line: dict[str, str]) -> str:
        return "" if line["prompt"].startswith("Question 3") else right(line) if "4" in line["prompt"] else "a"

    said_of = {"kind": "judged", "prompt": "p", "baseline": "a", "tuned": "b", "winner": "tuned", "reasons": []}
    judged = [said_of | {"id": told["row"]} for told in key.values()]
    (run.stage("evaluate") / "judge.jsonl").write_text("".join(map(runs.json_line, judged)))
    files = [fill(folder / "sheet.csv", tmp_path / "jo.csv", right)]
    files.append(fill(folder / "sheet.csv", tmp_path / "x.csv", lazy, reviewer="ann"))
    said = tunesmith("review", "desk", *(part for f in files for part in ("--read", f)), "--json")
    assert said.code == 0, said.out
    told = said.json
    assert told["reviewers"]["jo"] == 30 and told["reviewers"]["ann"] < 30
    assert told["preference"]["low"] > 0.5 and told["preference"]["n"] == 30
    assert told["strength"]["tuned"]["low"] > 0
    assert 0 < told["agreement"]["alpha"]["value"] < 1 and "kappa of ann and jo" in told["agreement"]
    assert told["agreement"]["kappa of people and the judge"]["value"] == pytest.approx(0)  # it says always the same
    now = runs.read_json(run.scorecard)
    assert now["review"]["preference"] == told["preference"] and now["metrics"] == card["metrics"]
    assert run.complete("evaluate") and "What people preferred" in run.report.read_text()
    shown = tunesmith("review", "desk", "--read", files[0])
    assert shown.code == 0 and "Bradley-Terry" in shown.out and "ann" in shown.out  # what was read earlier stays

    (run.stage("evaluate") / "answers.jsonl").write_text(
        "".join(
            runs.json_line(line | {"tuned": line["tuned"] | {"answer": "new"}})
            for line in runs.read_jsonl(run.stage("evaluate") / "answers.jsonl")
        )
    )
    with pytest.raises(DataError, match="no judgement is of the answers"):
        review.read(["desk"], [files[0]], None, tmp_path / "runs")


def test_sheets_that_cannot_be_read(tunesmith: Any, tmp_path: Path) -> None:
    evaluated(tmp_path)
    with pytest.raises(RunError, match="has no sheet yet"):
        review.read(["desk"], [tmp_path / "jo.csv"], None, tmp_path / "runs")
    review.sheet(["desk"], 5, None, tmp_path / "runs")
    item = next(iter(runs.read_json(tmp_path / "runs/desk/review/key.json")["items"]))
    for text, what in (
        ("a,b\n1,2\n", "lacks the columns"),
        (f"item,choice\n{item},c\n", "row 1.*'c' is no choice"),
        ("item,choice\nzz,a\n", "no pair is called 'zz'"),
        (f"item,choice,comment\n{item},a,{'x' * 200_000}\n", "is no CSV"),
    ):
        (tmp_path / "jo.csv").write_text(text)
        csv.field_size_limit(131_072)  # Python's own; whoever read data in this process has raised it
        with pytest.raises(DataError, match=what):
            review.read(["desk"], [tmp_path / "jo.csv"], None, tmp_path / "runs")
    (tmp_path / "one.csv").write_text(f"item,choice,reviewer\n{item},a,jo\n")
    (tmp_path / "two.csv").write_text(f"item,choice,reviewer\n{item},b,jo\n")
    with pytest.raises(DataError, match="filled one"):
        review.read(["desk"], [tmp_path / "one.csv", tmp_path / "two.csv"], None, tmp_path / "runs")


def test_runs_are_compared_and_a_review_outlives_a_new_evaluation(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe)
    for name, rate in (("one", 1e-30), ("two", 0.02)):
        sets = ("--set", f"name={name}", "--set", f"train.learning_rate={rate}")
        assert tunesmith("run", path, *sets).code == 0
    said = tunesmith("review", "one", "two", "--json")
    assert said.code == 0, said.out
    key = runs.read_json(tmp_path / "review/key.json")["items"]
    answer = fill(
        tmp_path / "review/sheet.csv", tmp_path / "jo.csv", lambda line: "a" if key[line["item"]]["a"] == "two" else "b"
    )
    told = tunesmith("review", "one", "two", "--read", answer, "--json").json
    assert set(told["strength"]) == {"two"} and told["strength"]["two"]["value"] > 0
    assert json.loads((tmp_path / "review/results.json").read_text()) == told

    assert tunesmith("review", "two").code == 0
    sheet = tmp_path / "runs/two/review/sheet.csv"
    answer = fill(sheet, tmp_path / "ann.csv", lambda line: "tie")
    assert tunesmith("review", "two", "--read", answer).code == 0
    sets = ("--set", "name=two", "--set", "train.learning_rate=0.02", "--set", "evaluate.bootstrap=500")
    said = tunesmith("run", path, *sets, "--json")
    assert said.code == 0 and said.json["scorecard"]["review"]["preference"]["value"] == 0.5, said.out
