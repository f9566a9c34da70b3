"""Any model can be evaluated; answers are kept as they come; what fails is counted; runs are ranked on shared rows."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import colour_rows, make_model, write_jsonl, write_recipe
from tests.fake_endpoint import FakeEndpoint
from tests.fake_hub import COMMIT, hub_of
from tunesmith.conversation.message import Message
from tunesmith.inference import endpoint, subject
from tunesmith.inference.engine import Sampling, Score
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask, Reply
from tunesmith.inference.transformers_engine import TransformersEngine


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "WAITS", (0.01,) * 4)


def colour_of(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"].split(".")[0].split()[-1]


def test_an_endpoint_against_a_folder_with_failures_counted(tunesmith: Any, tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(20))

    def fail(messages: list[dict[str, str]], number: int) -> int | None:
        if "Item 3 " in messages[-1]["content"]:
            return 500  # for good
        return 503 if number == 1 else None  # once

    with FakeEndpoint(colour_of, fail) as there:
        said = tunesmith(
            "evaluate", "--model", f"{there.url}#big", "--against", tiny_model, "--data", data,
            "--set", "evaluate.max_new_tokens=3", "--set", "gate=[accuracy.low >= 0.5]", "--json",
        )  # fmt: skip
        assert said.code == 0, said.out
        card = said.json
        assert card["metrics"]["accuracy"]["tuned"]["value"] == pytest.approx(19 / 20)  # the failed one is wrong
        assert sum(card["failures"]["tuned"].values()) == 1 and not card["failures"]["baseline"]
        assert "loss" not in card["metrics"]  # an endpoint gives no likelihoods
        assert there.asked[0]["path"] == "/v1/chat/completions" and there.asked[0]["temperature"] == 0
        assert (tmp_path / "evaluation/report.html").is_file() and (
            tmp_path / "evaluation/evaluate/junit.xml"
        ).is_file()
        asked = len(there.asked)
        there.fail = lambda messages, number: None
        said = tunesmith(
            "evaluate", "--model", f"{there.url}#big", "--against", tiny_model, "--data", data,
            "--set", "evaluate.max_new_tokens=3",
        )  # fmt: skip
        assert len(there.asked) == asked + 1  # only what failed is asked again
        assert "Verdict on accuracy" in said.out


def test_an_endpoint_that_lets_nobody_in(tunesmith: Any, tiny_model: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(4))
    with FakeEndpoint(colour_of, lambda m, n: 401) as there:
        said = tunesmith("evaluate", "--model", f"{there.url}#x", "--against", tiny_model, "--data", data, "--json")
    assert said.code == 2 and "OPENAI_API_KEY" in said.json["error"]["fix"]


def test_a_hub_id_against_a_folder(
    tunesmith: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(12))
    with hub_of(monkeypatch, tmp_path, {"team/good": tiny_model}) as hub:
        call = ["evaluate", "--against", tiny_model, "--data", data, "--set", "evaluate.max_new_tokens=3", "--json"]
        said = tunesmith(*call, "--model", "team/good")
        assert said.code in (0, 3, 4), said.out
        assert any("/team/good/" in path for path in hub.asked)
        assert said.json["models"]["tuned"] == "team/good"
        gap = said.json["metrics"]["loss"]["difference"]
        assert gap["value"] == gap["low"] == gap["high"] == 0 and said.json["verdict"] == "not_proven"  # one model
        assert COMMIT in (tmp_path / "evaluation/evaluate/manifest.json").read_text()
        assert tunesmith(*call, "--model", "team/none").code == 2


def test_runs_adapters_and_a_leaderboard(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    for name, steps in (("one", 2), ("two", 8)):
        assert tunesmith("run", path, "--set", f"name={name}", "--set", f"train.max_steps={steps}").code == 0
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(12))
    said = tunesmith(
        "evaluate", path, "--model", "two", "--against", tmp_path / "runs/two/train/adapter", "--data", data, "--json"
    )
    assert said.code == 0, said.out
    gap = said.json["metrics"]["loss"]["difference"]
    assert gap["value"] == 0 and said.json["verdict"] == "not_proven"  # a run is its base with its adapter
    said = tunesmith("evaluate", "--model", "two", "--against", recipe["model"], "--data", data, "--out", "b", "--json")
    assert said.json["metrics"]["loss"]["difference"]["value"] != 0

    said = tunesmith("compare", "one", "two", "--metric", "loss", "--json")
    assert said.code == 0, said.out
    board = said.json
    assert board["n"] == 8 and [r["run"] for r in board["runs"]] == sorted(
        ("one", "two"), key=lambda n: next(r["score"]["value"] for r in board["runs"] if r["run"] == n)
    )
    cards = {n: json.loads((tmp_path / f"runs/{n}/scorecard.json").read_text()) for n in ("one", "two")}
    for row in board["runs"]:
        assert row["score"]["value"] == pytest.approx(cards[row["run"]]["metrics"]["loss"]["tuned"]["value"])
    assert "p (Holm)" in tunesmith("compare", "one", "two").out


class Asked:
    """A subject that dies after so many answers."""

    name = "x"

    def __init__(self, lives: int) -> None:
        self.lives, self.count = lives, 0

    def answers(self, prompts: Any, limit: int, sampling: Any, tick: Any) -> Any:
        for i, prompt in enumerate(prompts):
            if self.count == self.lives:
                raise KeyboardInterrupt
            self.count += 1
            yield i, Reply(prompt.messages[0].content.upper())

    def likelihoods(self, rows: Any, tick: Any) -> Any:
        yield from ((i, Score(1.0, 1)) for i, _ in enumerate(rows))


def test_what_was_answered_before_a_kill_is_not_asked_again(tmp_path: Path) -> None:
    prompts = [Ask.user(f"q{i % 8}") for i in range(10)]  # two are asked twice
    first, second = Asked(5), Asked(100)
    with pytest.raises(KeyboardInterrupt):
        Kept(tmp_path / "a.jsonl", "x", lambda: first, len).replies(prompts, 5, lambda _: None)
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"key": "half a l\xc3')  # a kill in the middle of a line, and of a letter
    kept = Kept(tmp_path / "a.jsonl", "x", lambda: second, len)
    found = kept.replies(prompts, 5, lambda _: None)
    assert [r.text for r in found] == [f"Q{i % 8}" for i in range(10)]
    assert second.count == 8 - 5
    again = Kept(tmp_path / "a.jsonl", "x", lambda: pytest.fail("opened"), len)
    assert again.replies(prompts, 5, lambda _: None) == found


KILLED = """
import os, signal, sys
from tunesmith.inference import subject
from tunesmith.inference.transformers_engine import TransformersEngine
subject.BATCH = 8
plain, calls = TransformersEngine.generate, []
def generate(self, prompts, *others):
    calls.append(len(prompts))
    if len(calls) == 4:  # the fourth batch is never written down
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, prompts, *others)
TransformersEngine.generate = generate
from tunesmith.cli import main
main()
"""


def test_a_model_of_this_machine_killed_between_batches(
    tunesmith: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One batch is lost, the others are not asked again, and all that comes out is what comes out without a kill."""
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(44))
    other = make_model(tmp_path / "other", hidden_size=48)
    call = ["evaluate", "--model", str(tiny_model), "--against", str(other), "--data", str(data)]
    call += ["--set", "evaluate.max_new_tokens=4"]
    done = subprocess.run([sys.executable, "-c", KILLED, *call, "--out", "killed"], cwd=tmp_path, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (file,) = (tmp_path / "killed/answers").glob("*.jsonl")
    before = file.read_bytes()
    assert before.count(b"\n") == 3 * 8

    monkeypatch.setattr(subject, "BATCH", 8)
    asked: list[int] = []
    plain = TransformersEngine.generate

    def generate(self: Any, prompts: Any, *others: Any) -> Any:
        asked.append(len(prompts))
        return plain(self, prompts, *others)

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    resumed, whole = (tunesmith(*call, "--out", name, "--json") for name in ("killed", "whole"))
    assert resumed.code == whole.code, resumed.out
    assert sum(asked) == (44 - 24) + 44 + 2 * 44
    assert file.read_bytes().startswith(before)
    for path in (tmp_path / "whole/answers").glob("*.jsonl"):
        assert (tmp_path / "killed/answers" / path.name).read_bytes() == path.read_bytes()
    for name in ("scorecard.json", "answers.jsonl"):
        assert (tmp_path / "killed/evaluate" / name).read_bytes() == (tmp_path / "whole/evaluate" / name).read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_answers_do_not_depend_on_batch_or_order(architecture: str, tmp_path: Path) -> None:
    """Greedy and drawn, packed and with the model's own generation."""
    from tunesmith.models.load import load_renderer
    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    config = {"num_key_value_heads": 2} if architecture == "llama" else {}
    model = resolve(ModelSection(name=str(make_model(tmp_path / "m", architecture=architecture, **config))))
    engine, renderer = TransformersEngine(model, machine(), precision="float32"), load_renderer(model)
    prompts = [renderer.prompt([Message("user", "What colour? " * (i % 5 + 1) + str(i))]) for i in range(12)]
    for sampling in (None, Sampling(0.9, 3)):
        together = engine.generate(prompts, 8, renderer.stop_ids, lambda _: None, sampling)
        backwards = engine.generate(prompts[::-1], 8, renderer.stop_ids, lambda _: None, sampling)[::-1]
        alone = [engine.generate([p], 8, renderer.stop_ids, lambda _: None, sampling)[0] for p in prompts]
        assert together == backwards == alone
    other = engine.generate(prompts, 8, renderer.stop_ids, lambda _: None, Sampling(0.9, 4))
    assert other != together


def test_golden_cases_are_added_from_a_report_and_must_pass(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert tunesmith("run", write_recipe(tmp_path, recipe)).code == 0
    lines = [json.loads(x) for x in (tmp_path / "runs/tiny/evaluate/answers.jsonl").read_text().splitlines()]
    assert tunesmith("golden", "tiny", lines[0]["id"]).code == 0
    assert tunesmith("golden", "tiny", lines[0]["id"]).code == 0  # the same case, not a second one
    assert tunesmith("golden", "tiny", "nothing:1", "--json").code == 2
    assert "tunesmith golden tiny ROW" in (tmp_path / "runs/tiny/report.html").read_text()
    said = tunesmith("evaluate", tmp_path / "tiny.yaml", "--suite", "suite.yaml", "--json")  # the recipe's run
    assert said.code == 3 and said.json["model"] == "tiny", said.out
    with FakeEndpoint(colour_of) as there:
        said = tunesmith("evaluate", "--model", f"{there.url}#good", "--suite", "suite.yaml", "--json")
    assert said.code == 0 and len(said.json["cases"]) == 1, said.out
    with FakeEndpoint(lambda messages: "never") as there:
        said = tunesmith("evaluate", "--model", f"{there.url}#bad", "--suite", "suite.yaml")
    assert said.code == 3 and f"FAILED  {lines[0]['id']}" in said.out
    assert 'failures="1"' in (tmp_path / "evaluation/junit.xml").read_text()
    (tmp_path / "bad.yaml").write_text("cases: [{name: a, prompt: b}]")
    said = tunesmith("evaluate", "--model", "tiny", "--suite", "bad.yaml", "--json")
    assert said.code == 2 and "says what must hold" in said.json["error"]["what"]


@pytest.mark.parametrize(
    "text, what",
    [
        ("cases: []", "holds no cases"),  # nothing that could fail would pass
        ("", "has no list of cases"),
        ("[1, 2]", "has no list of cases"),
        ("cases: 3", "has no list of cases"),
        ("cases: [1]", "case"),
        ("cases: [", "is not a suite"),
        (b"cases: \xff", "is not a suite"),
        ("cases: [{name: a, messages: [{role: user}], equals: x}]", "messages are a list of"),
        ("cases: [{name: a, messages: [], equals: x}]", "messages are a list of"),
    ],
)
def test_suites_that_are_none(
    text: str | bytes, what: str, tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "suite.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    said = tunesmith("evaluate", "--model", "nothing", "--suite", "suite.yaml", "--json")
    assert said.code == 2 and what in said.json["error"]["what"], said.out


def test_a_case_is_never_added_to_what_is_no_suite(tunesmith: Any, tmp_path: Path) -> None:
    from tests.test_report import fake_run

    run = fake_run(tmp_path / "runs")
    run.origin.write_text("{}")
    row = json.loads((run.stage("evaluate") / "answers.jsonl").read_text().splitlines()[0])["id"]
    for text in ("[1, 2]", "cases: {a: 1}", "name: recipe"):
        (tmp_path / "suite.yaml").write_text(text)
        assert tunesmith("golden", "desk", row, "--json").json["error"]["where"] == "suite.yaml"
        assert (tmp_path / "suite.yaml").read_text() == text
    (tmp_path / "suite.yaml").write_text("")
    assert tunesmith("golden", "desk", row).code == 0


def test_runs_of_one_name_and_goals_of_ones_own_are_compared(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    from tests.test_report import fake_run

    for folder, right in (("a", 10), ("b", 20)):
        fake_run(tmp_path / folder, tuned_right=right).origin.write_text("{}")
    said = tunesmith("compare", "a/desk", "b/desk", "--metric", "exact_match", "--json")
    assert said.code == 0, said.out
    assert {r["run"]: round(r["score"]["value"] * 30) for r in said.json["runs"]} == {"a/desk": 10, "b/desk": 20}
    assert tunesmith("review", "a/desk", "b/desk", "--json").json["models"] == ["a/desk", "b/desk"]
    table = tunesmith("runs", "diff", "a/desk", "b/desk").out
    assert "a/desk" in table and "b/desk" in table
    for verb in (("compare",), ("review",), ("runs", "diff")):
        said = tunesmith(*verb, "a/desk", "a/../a/desk", "--json")
        assert said.code == 2 and said.json["error"]["what"] == "is named twice"

    (tmp_path / "b/odd").mkdir()
    (tmp_path / "b/odd/origin.json").write_text("{}")
    (tmp_path / "b/odd/evaluate").mkdir()
    (tmp_path / "b/odd/evaluate/manifest.json").write_text("{")  # a damaged run hides no other
    told = {run["run"]: run for run in tunesmith("runs", "list", "--runs", "b", "--json").json}
    assert "damaged" in told["odd"]["stages"] and told["desk"]["verdict"] == "better"

    (tmp_path / "checks.py").write_text("def long(answer, reference, row):\n    return len(answer)\n")
    recipe["goal"] = {"metric": "checks.py:long"}
    recipe["train"]["max_steps"] = 1
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("run", path).code == 0
    (tmp_path / "elsewhere").mkdir()
    for where in (tmp_path, tmp_path / "elsewhere"):
        monkey = pytest.MonkeyPatch()
        monkey.chdir(where)
        said = tunesmith("compare", "tiny", "--runs", tmp_path / "runs", "--json")
        monkey.undo()
        assert said.code == 0 and said.json["metric"] == "long", said.out


def test_what_compare_can_not_tell_is_an_error(tunesmith: Any, tmp_path: Path) -> None:
    from tests.test_report import fake_run
    from tunesmith.runs import json_line, read_jsonl

    run = fake_run(tmp_path / "runs")
    run.origin.write_text("{}")
    for metric in ("preference", "choice_accuracy"):
        said = tunesmith("compare", "desk", "--metric", metric, "--json")
        assert said.code == 2 and "can't be told from answers alone" in said.json["error"]["what"], said.out
    answers = run.stage("evaluate") / "answers.jsonl"
    lines = [line | {"tuned": line["tuned"] | {"nll": None}} for line in read_jsonl(answers)]
    size = answers.stat().st_size
    answers.write_text("".join(map(json_line, lines)))
    manifest = run.stage("evaluate") / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(size), str(answers.stat().st_size)))
    said = tunesmith("compare", "desk", "--metric", "loss", "--json")
    assert said.code == 2 and "needs likelihoods" in said.json["error"]["what"], said.out


def test_rows_that_are_too_few_alike_or_too_long(tunesmith: Any, tiny_model: Path, tmp_path: Path) -> None:
    told = ("evaluate", "--model", tiny_model, "--set", "evaluate.max_new_tokens=3", "--against")
    with FakeEndpoint(colour_of) as good, FakeEndpoint(lambda messages: "none") as bad:
        few = write_jsonl(tmp_path / "few.jsonl", colour_rows(1))
        call = ("evaluate", "--model", f"{good.url}#a", "--against", f"{bad.url}#b", "--data", few)
        call += ("--set", "evaluate.metrics=[rouge_l]")
        said = tunesmith(*call, "--set", "gate=[goal.difference > 0]", "--json")
        assert said.code == 4 and said.json["verdict"] == "not_proven", said.out  # though all of it got better
        assert ": 1 held-out row " in " ".join(tunesmith(*call).out.split())
        write_jsonl(few, colour_rows(6) + colour_rows(2))
        assert "2 of 8 rows repeat an earlier one" in tunesmith(*call).err
    long = write_jsonl(tmp_path / "long.jsonl", [*colour_rows(1), {"prompt": "word " * 600, "completion": "red"}])
    said = tunesmith(*told, tiny_model, "--data", long, "--json")
    assert said.code == 2 and said.json["error"]["where"] == "long.jsonl:2", said.out
    assert "reads 512" in said.json["error"]["what"]
    said = tunesmith(*told, "tinny", "--data", few, "--json")
    assert said.code == 2 and "no model, run or adapter is called 'tinny'" in said.json["error"]["what"], said.out


@pytest.mark.parametrize(
    "rule, answer, passes",
    [
        ({"equals": '{"a": 1}'}, '{ "a": 1.0 }', True),
        ({"contains": ["Red", "blue"]}, "red and BLUE", True),
        ({"contains": "red"}, "green", False),
        ({"lacks": "sorry"}, "I am Sorry", False),
        ({"matches": r"^\d+$"}, "42", True),
    ],
)
def test_golden_rules(rule: dict[str, Any], answer: str, passes: bool) -> None:
    from tunesmith.evaluate.golden import Case

    assert (not Case(name="x", prompt="y", **rule).judge(answer)) is passes


@pytest.fixture
def rounded(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model with weights in bfloat16, as a folder; a cache of the test's own for what is unpacked."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "rounded")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "rounded")
    return tmp_path / "rounded"


def test_a_gguf_file_against_the_model_that_it_was_made_of(tunesmith: Any, rounded: Path, tmp_path: Path) -> None:
    from tunesmith.models.gguf_file import write_model

    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(8))
    gaps = {}
    for precision in ("bfloat16", "q4_0"):
        write_model(rounded, tmp_path / f"{precision}.gguf", precision)
        said = tunesmith(
            "evaluate", "--model", f"{precision}.gguf", "--against", rounded, "--data", data, "--out", precision,
            "--set", "evaluate.max_new_tokens=4", "--json",
        )  # fmt: skip
        assert said.code == 0, said.out
        assert said.json["models"]["tuned"] == f"{precision}.gguf"
        gaps[precision] = abs(said.json["metrics"]["loss"]["difference"]["value"])
    assert gaps["bfloat16"] < 1e-6 < gaps["q4_0"]  # what four bits cost shows
    lines = [json.loads(x) for x in (tmp_path / "bfloat16/evaluate/answers.jsonl").read_text().splitlines()]
    assert all(line["tuned"]["answer"] == line["baseline"]["answer"] for line in lines)


def test_a_gguf_file_answers_through_llamacpp_itself(tunesmith: Any, rounded: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    from tunesmith.models.gguf_file import write_model

    write_model(rounded, tmp_path / "m.gguf", "bfloat16")
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(4))
    told = ("evaluate", "--model", "m.gguf", "--against", rounded, "--data", data, "--json")
    limit = ("--set", "evaluate.max_new_tokens=4")
    usual, said = tunesmith(*told, *limit), tunesmith(*told, *limit, "--set", "evaluate.engine=llamacpp")
    assert usual.code == said.code == 0, said.out
    assert "loss" in usual.json["metrics"] and "loss" not in said.json["metrics"]
    for name, score in said.json["metrics"].items():
        assert score["difference"] == usual.json["metrics"][name]["difference"]


def test_a_model_with_classes_is_evaluated_by_its_classes(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["train"] |= {"method": "classify", "max_steps": 30, "epochs": 10}
    assert tunesmith("run", write_recipe(tmp_path, recipe)).code == 0
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(12))
    adapter = tmp_path / "runs/tiny/train/adapter"
    told = ("evaluate", "--model", "tiny", "--data", data, "--json")
    said = tunesmith(*told, "--against", recipe["model"])
    assert said.code == 0, said.out
    assert said.json["metrics"]["accuracy"]["tuned"]["value"] > 0.5  # by language alone, none
    said = tunesmith(*told, "--against", adapter)
    assert said.json["metrics"]["loss"]["difference"]["value"] == 0, said.out
