"""The report says what the artifacts say, loads nothing from outside, and shows users' text as text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith import charts, runs
from tunesmith.conversation.message import Conversation, Message
from tunesmith.evaluate import report
from tunesmith.evaluate.evaluate import EvaluateInputs, evaluate
from tunesmith.evaluate.section import EvaluateSection
from tunesmith.inference.engine import Score
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Reply
from tunesmith.runs import Run

HOSTILE = '<script>alert("tuned")</script>'
MODEL = {
    "name": "smollm2-135m-instruct",
    "source": "embedded",
    "identity": "44a49a59291c3901",
    "licence": "apache-2.0",
    "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "trust_remote_code": False,
}
MACHINE = {"cpu": "A <processor>", "cores": 2, "device": "cpu", "precision": "float32", "memory_gib": 23.5}
PACKAGED = {
    "largest_difference": 0.01,
    "mean_kl": 1e-5,
    "same_next_token": 0.998,
    "tokens": 900,
    "precision": "bfloat16",
    "tolerance": 0.1,
}


class FakeModel:
    """Answers the question numbered i with `answers[i]` and finds every reference as likely as `nll` says."""

    name = "fake"

    def __init__(self, answers: list[str], nll: float) -> None:
        self.given, self.nll = answers, nll

    def answers(self, prompts: Any, limit: int, sampling: Any, tick: Any) -> Any:
        for i, prompt in enumerate(prompts):
            yield i, Reply(self.given[int(prompt.messages[-1].content.split()[1])])

    def likelihoods(self, rows: Any, tick: Any) -> Any:
        for i, _ in enumerate(rows):
            yield i, Score(self.nll * (1 + i / 300), 6)


def fake_run(folder: Path, kind: str = "json", n: int = 30, goal: str | None = None, tuned_right: int = 24) -> Run:
    """A trained and evaluated run, its scorecard and answers made by the evaluation stage itself."""
    run = Run(folder / "desk")
    run.path.mkdir(parents=True)
    rows = [_row(i, kind) for i in range(n)]
    run.recipe.write_text(yaml.safe_dump(_recipe()))
    counts = {"read": 100, "accepted": 97, "rejected": 1, "removed": {"over_length": 2}}
    counts |= {"train": 97 - n - 5, "validation": 5, "test": n}
    write_stage(run, "data", {"test.jsonl": "{}\n"}, counts=counts, answers={"kind": kind, "labels": {}})
    summary = {
        "steps": 12,
        "tokens": 15000,
        "best_step": 10,
        "best_validation_loss": 0.25,
        "parameters": {"total": 134_515_008, "trained": 4_884_480},
        "precision": "float32",
        "threads": 2,
        "forward": "rows packed",
    }
    write_stage(run, "train", {"adapter/adapter_config.json": "{}"}, parents=("data",), summary=summary)
    lines = [_step(step) for step in range(1, 13)]
    run.metrics.write_text("".join(map(runs.json_line, lines)))

    right = [row.answer for row in rows]
    given = {
        "baseline": FakeModel([right[0], *(["no idea"] * (n - 1))], 30.0),
        "tuned": FakeModel([HOSTILE, *right[1 : tuned_right + 1], *(["?"] * n)][:n], 3.0),
    }
    subjects = {
        side: Kept(run.answers / f"{side}.jsonl", side, lambda model=model: model, lambda text: len(text.split()))
        for side, model in given.items()
    }
    inputs = EvaluateInputs(rows, kind, goal, subjects, 7)
    target = run.stage("evaluate")
    target.mkdir()
    card = evaluate(EvaluateSection(bootstrap=200), inputs, target)
    write_stage(run, "evaluate", {}, parents=("data", "train"), verdict=card["verdict"])
    run.scorecard.write_text((target / "scorecard.json").read_text())
    return run


def _row(i: int, kind: str) -> Conversation:
    answer = {
        "json": json.dumps({"intent": f"i{i}", "refund": i % 2 == 0}),
        "label": f"label {i % 3}",
        "text": f"the whole answer number {i}",
    }[kind]
    asked = f"Question {i} & <b>{i}</b>"
    messages = (Message("system", "Triage."), Message("user", asked), Message("assistant", answer))
    return Conversation(messages, f"test.jsonl:{i + 1}")


def _recipe() -> dict[str, Any]:
    return {
        "name": "desk",
        "seed": 7,
        "goal": {"metric": None},
        "model": {"name": MODEL["name"]},
        "data": {"sources": [{"path": "/somewhere/train.jsonl"}], "system": "Triage."},
        "train": {
            "method": {"kind": "sft", "loss_on": "assistant"},
            "adapter": {"kind": "lora", "rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"},
            "epochs": 2.0,
            "batch_size": 16,
            "max_length": 256,
            "learning_rate": 0.001,
            "schedule": "cosine",
            "warmup": 0.05,
        },
    }


def _step(step: int) -> dict[str, Any]:
    line = {
        "step": step,
        "epoch": step / 6,
        "loss": 2.5 / step,
        "learning_rate": 1e-3 * (1 - step / 12),
        "grad_norm": 3.0 / step,
        "tokens": 1250,
        "tokens_per_second": 100.0 + step,
        "memory_bytes": 3 * 2**30,
    }
    return line | ({"validation_loss": 2.6 / step} if step % 6 == 0 else {})


def write_stage(run: Run, stage: str, files: dict[str, str], parents: tuple[str, ...] = (), **told: Any) -> None:
    """A complete stage, its manifest as pipeline.py writes it."""
    folder = run.stage(stage)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    made_from = {parent: run.complete(parent) for parent in parents}
    manifest = {
        "stage": stage,
        "key": runs.hash_json(stage),
        "facts": {},
        "model": MODEL,
        "parents": {p: {"key": m["key"], "digest": runs.digest(m)} for p, m in made_from.items() if m},
        "inputs": {},
        "outputs": runs.outputs_of(folder, "adapter" if stage == "train" else "."),
        **told,
        "seed": 7,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": MACHINE,
        "started": "2026-11-22T01:55:42+0000",
        "seconds": 12.3,
    }
    runs.write_json(folder / "manifest.json", manifest)


class Page(HTMLParser):
    """What a page holds: its text, its elements in order, and the text of each <pre>."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.pres: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, f"not closed: {self._open}"
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "input"):
            self._open.append(tag)
        if tag == "pre":
            self.pres.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data + " "
        if "pre" in self._open:
            self.pres[-1] += data

    def rows(self, group: str | None = None) -> list[str | None]:
        """The ids of the answers that are shown."""
        return [a["data-row"] for tag, a in self.elements if tag == "article" and group in (None, a["data-group"])]


def page(run: Run) -> Page:
    report.write_report(run)
    return Page(run.report)


def test_facts_of_the_run_are_on_the_page(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    shown = page(run)
    card = runs.read_json(run.scorecard)
    assert ("div", {"class": "verdict better", "id": "verdict", "data-verdict": "better"}) in shown.elements
    assert "The tuned model is better. The goal is exact_match" in shown.text
    for name, score in card["metrics"].items():
        assert name in shown.text
        for side in ("baseline", "tuned"):
            assert f"{report.number(score[side]['value'])} {report.number(score[side]['low'])} to" in shown.text
        assert report.signed(score["difference"]["low"]) + " to " in shown.text
    gap = card["metrics"]["exact_match"]["difference"]
    assert 0 < gap["smallest"] < 1
    smallest = f"so many rows would show in 80 of 100 tests is {report.number(gap['smallest'])} exact_match"
    assert smallest in shown.text
    assert "over_length 2" in shown.text
    assert "4,884,480 (3.63%)" in shown.text
    assert "tokens a second, median 106" in shown.text
    assert "peak memory 3.00 GiB" in shown.text
    assert "forward path rows packed" in shown.text
    for stage in ("data", "train", "evaluate"):
        manifest = run.complete(stage)
        assert manifest and manifest["key"] in shown.text and runs.digest(manifest) in shown.text
    assert run.recipe.read_text().strip() in [text.strip() for text in shown.pres]
    assert sum(tag == "svg" for tag, _ in shown.elements) == len(card["metrics"]) + 3


def test_twenty_answers_without_repeats(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    shown = page(run)
    assert [len(shown.rows(group)) for group in ("best", "worst", "random")] == [7, 7, 6]
    assert len(set(shown.rows())) == 20
    assert shown.rows("worst")[0] == "test.jsonl:1"  # right before, wrong now
    assert "both models are right on 0, only the tuned one on 24, only the baseline on 1, neither on 5" in shown.text
    assert shown.rows() == page(run).rows()


@pytest.mark.parametrize("n", [1, 2, 9, 19, 20])
def test_fewer_rows_are_all_shown(tmp_path: Path, n: int) -> None:
    shown = page(fake_run(tmp_path, n=n))
    assert sorted(filter(None, shown.rows())) == sorted(f"test.jsonl:{i + 1}" for i in range(n))


def test_text_of_users_stays_text(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    shown = page(run)
    assert HOSTILE in shown.pres
    assert any(re.fullmatch(r"Question \d+ & <b>\d+</b>", text) for text in shown.pres)
    assert not [tag for tag, _ in shown.elements if tag in ("link", "img", "iframe", "object")]
    assert sum(tag == "script" for tag, _ in shown.elements) == 1  # the page's own search
    assert run.report.read_text().count("<script>") == 1
    assert "A <processor>" in shown.text


def test_nothing_is_loaded_from_outside(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    shown = page(run)
    for _, attributes in shown.elements:
        assert "src" not in attributes and "srcset" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    styles = run.report.read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in styles and "@import" not in styles


def test_package_check_is_shown_once_there_is_one(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert "The merged model was compared" not in page(run).text
    write_stage(run, "package", {"model/config.json": "{}"}, parents=("data", "train", "evaluate"), check=PACKAGED)
    assert "same next token 99.80%" in page(run).text


def test_a_goal_without_row_scores_falls_back_to_equality(tmp_path: Path) -> None:
    run = fake_run(tmp_path, kind="label", goal="macro_f1")
    assert '"score": null' in (run.stage("evaluate") / "answers.jsonl").read_text()
    assert "only the tuned one on 24, only the baseline on 1" in page(run).text


def test_graded_goals_show_scores_instead_of_right_and_wrong(tmp_path: Path) -> None:
    shown = page(fake_run(tmp_path, kind="text", goal="chrf"))
    assert "chrf 100.000" in shown.text
    assert "wrong" not in shown.text


@pytest.mark.parametrize("goal", ["loss", "perplexity"])
def test_lower_is_better(tmp_path: Path, goal: str) -> None:
    run = fake_run(tmp_path, goal=goal)
    text = page(run).text
    assert "The tuned model is better." in text
    assert "The whole interval is below zero (lower is better)." in text


def test_an_interval_that_needs_more_rows_says_so(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    card = runs.read_json(run.scorecard)
    card["metrics"][card["goal_metric"]]["difference"]["needs"] = 1234
    runs.write_json(run.scorecard, card | {"verdict": "not_proven"})
    shown = page(run).text
    assert "(no proof: takes 1,234 rows)" in shown and "Too few rows bear on the difference" in shown
    assert "holds zero" not in shown


def test_not_proven_is_said(tmp_path: Path) -> None:
    shown = page(fake_run(tmp_path, tuned_right=1))
    assert "Not proven." in shown.text and "The interval holds zero" in shown.text


@pytest.mark.parametrize(
    "points",
    [[(1, 2.0)], [(1, 5.0), (2, 5.0)], [(1, 0.0), (2, math.nan), (3, math.inf)], [(1, 1e-5), (9, 4e4)]],
)
def test_curves_hold_what_is_finite(points: list[tuple[float, float]]) -> None:
    svg = charts.curves("a < b", [charts.Series("s", "tuned", points)])
    assert "a &lt; b" in svg
    assert "nan" not in svg and "inf" not in svg
    for coordinate in re.findall(r' (?:[xy][12]?|c[xy])="([^"]*)"', svg):
        assert -1 <= float(coordinate) <= 601


def test_charts_of_nothing_are_empty() -> None:
    assert charts.curves("t", []) == charts.intervals("t", []) == ""
    assert charts.curves("t", [charts.Series("s", "tuned", [(1, math.nan)])]) == ""
    assert charts.intervals("t", [("a", "tuned", math.nan, math.nan, math.nan)]) == ""
    assert "whisker" in charts.intervals("t", [("a", "tuned", 0.0, 0.0, 0.0)])


@pytest.mark.parametrize("low, high", [(0, 1), (0.2, 0.21), (-3, 17), (1e-5, 2e-3), (5, 5), (0, 0), (1.2, 48_000)])
def test_ticks_are_few_and_enclose_the_range(low: float, high: float) -> None:
    marks = charts.ticks(low, high)
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 7


def test_smoothing_keeps_lines_and_ends() -> None:
    line = [(float(x), 3.0 * x) for x in range(100)]
    assert charts.smooth(line) == line
    assert charts.smooth([(1, 4.0), (2, 0.0), (3, 2.0)]) == [(1, 4.0), (2, 2.0), (3, 2.0)]
    assert charts.smooth([]) == []


def test_gate_slices_sections_errors_and_every_answer_are_shown(tmp_path: Path) -> None:
    run = fake_run(tmp_path, kind="label")
    card = runs.read_json(run.scorecard)
    span = {"low": 0.1, "value": 0.2, "high": 0.3}
    card |= {
        "gate": {
            "decision": "hold", "enforced": True,
            "conditions": [{"condition": "forgetting.kl <= 0.05", "met": False, "state": "broken", "why": "x"}],
        },
        "forgetting": {"kl": span | {"n": 204}},
        "safety": {"refusal": {"baseline": span, "tuned": span, "difference": span, "n": 40}},
    }  # fmt: skip
    runs.write_json(run.scorecard, card)
    (run.stage("evaluate") / "forgetting.jsonl").write_text(
        runs.json_line({"kind": "code", "prompt": "<b>p</b>", "baseline": "one", "tuned": HOSTILE})
    )
    shown = page(run)
    assert any(a.get("data-decision") == "hold" for _, a in shown.elements)
    assert "Gate: hold ✗ forgetting.kl <= 0.05" in shown.text
    assert "Slices, worst first" in shown.text and "label: label 0" in shown.text
    assert "kl 0.200 0.100 to 0.300 204" in shown.text and "refusal 0.200" in shown.text
    assert "an answer that is no label" in shown.text and "What the tuned model took for what" in shown.text
    assert HOSTILE in shown.pres and "<b>p</b>" in shown.pres
    table = run.report.read_text().split('<table id="every">')[1].split("</table>")[0]
    assert table.count("<tr>") == 31 and table.index("test.jsonl:1<") < table.index("test.jsonl:2<")  # lost first
