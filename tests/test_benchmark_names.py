"""Training rows against public benchmarks by name: from the hub, from files, or a clear error."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_jsonl
from tests.fake_hub import hub_of
from tests.test_clean import THIRTEEN, answers, cleaned, pairs  # noqa: F401
from tunesmith.data.clean.benchmarks import KNOWN
from tunesmith.errors import DataError

PERU = "What is the capital of Peru?"


def test_public_benchmarks_by_name(cleaned: Any, tmp_path: Path, monkeypatch: Any) -> None:  # noqa: F811
    """From the hub, from a folder where there is one, and with a sentence where neither has it."""
    rows = pairs((f"Tell me: {THIRTEEN}!", "a"), ("Where is my card?", "b"), (PERU, "c"))
    sets = tmp_path / "sets"
    asks = {"gsm8k/main": THIRTEEN, "arc/ARC-Easy": PERU, "arc/ARC-Challenge": "x y z"}
    for name, asked in asks.items():
        (sets / name).mkdir(parents=True)
        write_jsonl(sets / name / "test.jsonl", [{"question": asked}])
    with hub_of(monkeypatch, tmp_path, {"openai/gsm8k": sets / "gsm8k", "allenai/ai2_arc": sets / "arc"}):
        made, told = cleaned(rows, {"contamination": ["gsm8k", "ARC"]})
        assert told["contamination"]["found"] == {"gsm8k": 1, "ARC": 1} and answers(made) == ["b"]
        with pytest.raises(DataError, match="benchmark mmlu is cais/mmlu of the hub, which is not a data set") as no:
            cleaned(rows, {"contamination": ["mmlu"]})
        assert "folder" in str(no.value.fix)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="is not on this disk, and the hub can't be reached"):
        cleaned(rows, {"contamination": ["humaneval"]})
    (tmp_path / "files").mkdir()
    write_jsonl(tmp_path / "files/humaneval.jsonl", [{"prompt": "Where is my card"}])
    made, told = cleaned(rows, {"contamination": {"against": ["humaneval"], "folder": "files"}})
    assert told["contamination"]["found"] == {"humaneval": 1} and answers(made) == ["a", "c"]
    for name, meant in (("gsm8", "did you mean 'gsm8k'"), ("ours", "no file")):
        with pytest.raises(DataError, match=f"no benchmark is called '{name}'.*{meant}"):
            cleaned(rows, {"contamination": [name]})


def test_known_benchmarks_are_those_of_the_harness() -> None:
    lm_eval = importlib.util.find_spec("lm_eval")
    if lm_eval is None or lm_eval.origin is None:
        pytest.skip("lm-evaluation-harness is not installed")
    tasks = Path(lm_eval.origin).parent / "tasks"
    groups = "gsm8k arc humaneval mbpp hellaswag truthfulqa winogrande piqa openbookqa super_glue commonsense_qa "
    groups += "ifeval hendrycks_math drop triviaqa mmlu"
    named = set()
    for path in (path for group in groups.split() for path in (tasks / group).rglob("*")):
        if path.is_file() and path.suffix in (".yaml", ""):
            keys = dict(re.findall(r"^(dataset_path|dataset_name): *['\"]?([^\s'\"]+)", path.read_text(), re.M))
            named |= {(keys.get("dataset_path"), subset) for subset in (None, keys.get("dataset_name"))}
    mmlu = {("cais/mmlu", "all")}  # the harness takes its subjects one by one
    assert {(hub, subset) for sets in KNOWN.values() for hub, subset, _ in sets} - named <= mmlu
