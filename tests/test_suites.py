"""Public tasks on local files score as lm-evaluation-harness scores the same file with the same model, row by row."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_jsonl, write_recipe
from tunesmith.errors import RecipeError
from tunesmith.evaluate.metrics.structured import last_number
from tunesmith.evaluate.section import SuiteSection
from tunesmith.evaluate.suites import Suites, harness
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask, Local


def kept(model_folder: Path, folder: Path) -> Kept:
    from tunesmith.inference.transformers_engine import TransformersEngine
    from tunesmith.models.load import load_renderer
    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    model = resolve(ModelSection(name=str(model_folder)))
    local = Local("tiny", TransformersEngine(model, machine(), precision="float32"), load_renderer(model))
    return Kept(folder / "a.jsonl", "tiny", lambda: local, len)


@pytest.fixture(scope="module")
def subject(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    return kept(tiny_model, tmp_path_factory.mktemp("kept"))


def local_task(file: Path, **keys: Any) -> dict[str, Any]:
    """A task of the harness on a local file."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
    return {"task": f"local_{file.stem}"} | data | keys


def averaged(*names: str) -> list[dict[str, Any]]:
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


@pytest.mark.parametrize(
    "name", ["copa", *(pytest.param(n, marks=pytest.mark.long) for n in ("openbook_qa", "arc_easy"))]
)
def test_choices_score_as_lm_eval_scores_them(
    name: str, subject: Kept, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = (shared / f"benchmarks/{name}.jsonl").read_text().splitlines()[:40]
    file = write_jsonl(tmp_path / f"{name}.jsonl", [json.loads(line) for line in lines])
    suite = SuiteSection(name=name, file=str(file), template="{query}\nAnswer:" if name == "arc_easy" else None)
    ours = Suites([suite], tmp_path, 8, 100, 0).ask(subject, "tuned", None)[name]
    task = local_task(
        file,
        output_type="multiple_choice",
        doc_to_text="{{query}}\nAnswer:" if name == "arc_easy" else "{{query}}",
        doc_to_target="gold",
        doc_to_choice="{{choices}}",
        metric_list=averaged("acc", "acc_norm"),
    )
    theirs = harness(subject, task, None)
    assert ours["acc"] == theirs["acc"] and ours["acc_norm"] == theirs["acc_norm"]
    assert 0 < sum(ours["acc"]) < len(lines)


def test_schemas_score_as_lm_eval_scores_them(
    subject: Kept, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = (shared / "benchmarks/winograd_wsc.jsonl").read_text().splitlines()[:30]
    file = write_jsonl(tmp_path / "winograd.jsonl", [json.loads(line) for line in lines])
    ours = Suites([SuiteSection(name="x", file=str(file), kind="schema")], tmp_path, 8, 100, 0)
    task = local_task(
        file,
        output_type="multiple_choice",
        doc_to_text="{{gold}}",
        doc_to_target="{{continuation}}",
        doc_to_choice="{{context_options}}",
        metric_list=averaged("acc"),
    )
    theirs = harness(subject, task, None)["acc"]
    assert ours.ask(subject, "tuned", None)["x"]["acc"] == theirs and 0 < sum(theirs) < len(lines)


def test_numbers_score_as_lm_eval_scores_them(
    tiny_model: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By GSM8K's own regular expression, under the chat template; of a model that likes to write digits."""
    lm_eval = pytest.importorskip("lm_eval")
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[[tokenizer.convert_tokens_to_ids(d) for d in "123456789"]] *= 2
    model.save_pretrained(tmp_path / "digits")
    tokenizer.save_pretrained(tmp_path / "digits")
    subject = kept(tmp_path / "digits", tmp_path)
    lines = (shared / "benchmarks/svamp.jsonl").read_text().splitlines()[:24]
    rows = [{"question": json.loads(line)["context"], "answer": json.loads(line)["answer"]} for line in lines]
    suite = SuiteSection(name="x", file="svamp.jsonl", kind="numeric", max_new_tokens=6)
    given = [r.text for r in subject.replies([Ask.user(row["question"]) for row in rows], 6, lambda _: None)]
    numbers = [f"{n:g}" for text in given if (n := last_number(text)) is not None and n < 1e6]
    for i, row in enumerate(rows):  # some references are what the model happens to say
        row["answer"] = numbers[i % len(numbers)] if i % 3 else row["answer"]
    file = write_jsonl(tmp_path / "svamp.jsonl", rows)
    ours = Suites([suite], tmp_path, 8, 100, 0).ask(subject, "tuned", None)["x"]["acc"]
    task = local_task(
        file,
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["<|im_end|>"], "max_gen_toks": 6, "do_sample": False},
        filter_list=[
            {
                "name": "flexible",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            }
        ],
        metric_list=[*averaged("exact_match")],
    )
    local: Any = subject.subject
    lm = HFLM(pretrained=local.engine.model, tokenizer=local.renderer.tokenizer, batch_size=8)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[task], apply_chat_template=True, bootstrap_iters=0, log_samples=True
    )
    samples = sorted(found["samples"]["local_svamp"], key=lambda row: row["doc_id"])
    assert [s["resps"][0][0] for s in samples] == given
    assert ours == [s["exact_match"] for s in samples] and 0 < sum(ours) < len(rows)


def test_a_task_of_lm_eval_by_its_name(subject: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real harness finds a task among those that it knows, reads its data and asks the model: row by row what our
    own scoring of the file says."""
    pytest.importorskip("lm_eval")
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    made = [
        {"query": f"Item {i} is", "choices": ["red", "green and blue", "a grey one"], "gold": i % 3} for i in range(9)
    ]
    file = write_jsonl(tmp_path / "items.jsonl", made)
    task = local_task(file, output_type="multiple_choice", doc_to_text="{{query}}", doc_to_choice="{{choices}}")
    task |= {"doc_to_target": "{{gold}}", "metric_list": averaged("acc", "acc_norm")}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/items.yaml").write_text(json.dumps(task | {"task": "items_by_name"}))  # JSON is YAML
    known = functools.partial(TaskManager, include_path=str(tmp_path / "tasks"), include_defaults=False)
    monkeypatch.setattr(evaluator, "TaskManager", known)

    suites = [SuiteSection(name="items_by_name"), SuiteSection(name="file", file=str(file))]
    found = Suites(suites, tmp_path, 8, 100, 0).ask(subject, "tuned", None)
    assert found["items_by_name"] == found["file"]
    assert set(found["file"]) == {"acc", "acc_norm"} and 0 < sum(found["file"]["acc"]) < 9
    few = SuiteSection(name="items_by_name", rows=4)
    assert (
        Suites([few], tmp_path, 8, 100, 0).ask(subject, "tuned", None)["items_by_name"]["acc"]
        == (found["file"]["acc"][:4])
    )
    with pytest.raises(RecipeError, match="lm-eval can't run 'no_such_task'"):
        harness(subject, "no_such_task", None)


def test_what_lm_eval_says_of_a_task_is_told_by_its_name_and_kept(
    subject: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Two ways of reading an answer are two scores; perplexities are no means; corpus scores are left out."""
    lm_eval = pytest.importorskip("lm_eval")
    asked: list[Any] = []

    def evaluated(**told: Any) -> Any:
        asked.append(told)
        rows = [
            {"doc_id": i, "filter": way, "metrics": ["exact_match", "word_perplexity", "f1"], "exact_match": i % 2,
             "word_perplexity": (-6.0, 3), "f1": (0, 1)}
            for i in (1, 0) for way in ("strict", "flexible")
        ]  # fmt: skip
        return {"samples": {told["tasks"][0]: rows}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluated)
    suite = Suites([SuiteSection(name="made_up", rows=2, shots=3)], tmp_path, 8, 100, 0)
    found = {side: suite.ask(subject, side, None) for side in ("baseline", "tuned")}
    assert len(asked) == 1 and asked[0]["num_fewshot"] == 3 and asked[0]["limit"] == 2  # asked once, then kept
    told = suite.compare(found)["suites"]["made_up"]
    assert {f"{name}:{way}" for name in ("exact_match", "word_perplexity") for way in ("strict", "flexible")} == set(
        told
    )
    assert told["exact_match:strict"]["tuned"]["value"] == 0.5 and told["exact_match:strict"]["n"] == 2
    assert told["word_perplexity:strict"]["tuned"]["value"] == pytest.approx(np.exp(2))
    assert "f1 of lm-eval can't be told from single rows" in capsys.readouterr().err

    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **_: {"samples": {"x": []}})
    with pytest.raises(RecipeError, match="gives no score"):
        harness(subject, "empty", None)


def test_files_of_every_kind_before_and_after(
    tunesmith: Any, recipe: dict[str, Any], shared: Path, tmp_path: Path
) -> None:
    recipe["evaluate"]["suites"] = [
        {"name": "winograd", "file": str(shared / "benchmarks/winograd_wsc.jsonl"), "kind": "schema", "rows": 6},
        {"name": "svamp", "file": str(shared / "benchmarks/svamp.jsonl"), "kind": "numeric", "rows": 4,
         "max_new_tokens": 4},
        {"name": "gsm8k", "file": str(shared / "gsm8k/train.jsonl"), "kind": "numeric", "rows": 4,
         "max_new_tokens": 4},
        {"name": "code", "file": str(shared / "code/human_eval_return_simple.jsonl"), "kind": "code", "rows": 3,
         "max_new_tokens": 4},
        {"name": "copa", "file": str(shared / "benchmarks/copa.jsonl"), "rows": 6},
    ]  # fmt: skip
    recipe["train"]["max_length"] = 512
    said = tunesmith("run", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out
    suites = said.json["scorecard"]["suites"]
    assert {name: set(s) for name, s in suites.items()} == {
        "winograd": {"acc"}, "svamp": {"acc"}, "gsm8k": {"acc"}, "code": {"pass_at_1"}, "copa": {"acc", "acc_norm"},
    }  # fmt: skip
    assert suites["copa"]["acc"]["n"] == 6 and suites["copa"]["acc"]["tuned"]["low"] >= 0

    recipe["evaluate"]["suites"] = [{"name": "x", "file": str(shared / "benchmarks/svamp.jsonl")}]
    said = tunesmith("evaluate", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 2 and "lacks 'query'" in said.json["error"]["what"]
