"""Public tasks on local files score as lm-evaluation-harness scores the same file with the same model, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_jsonl, write_recipe
from tunesmith.evaluate.section import SuiteSection
from tunesmith.evaluate.suites import Suites, harness
from tunesmith.inference.subject import Kept, Local


@pytest.fixture(scope="module")
def subject(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    from tunesmith.inference.transformers_engine import TransformersEngine
    from tunesmith.models.load import load_renderer
    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    model = resolve(ModelSection(name=str(tiny_model)))
    local = Local("tiny", TransformersEngine(model, machine(), precision="float32"), load_renderer(model))
    return Kept(tmp_path_factory.mktemp("kept") / "a.jsonl", "tiny", lambda: local, len)


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
    task = {
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:" if name == "arc_easy" else "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    theirs = harness(subject, task, None)
    assert ours["acc"] == theirs["acc"] and ours["acc_norm"] == theirs["acc_norm"]
    assert 0 < sum(ours["acc"]) < len(lines)


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
