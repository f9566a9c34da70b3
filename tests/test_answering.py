"""Evaluation and chat through a serving engine: the same answers as through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe

pytest.importorskip("xllamacpp")
pytest.importorskip("aiohttp")
pytest.importorskip("llguidance")


def test_a_run_is_evaluated_and_talked_with_through_llamacpp(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("run", path)
    assert said.code in (0, 3, 4), said.err
    usual = json.loads((tmp_path / "runs/tiny/scorecard.json").read_text())
    said = tunesmith("evaluate", path, "--set", "evaluate.engine=llamacpp")
    assert said.code in (0, 3, 4), said.err
    card = json.loads((tmp_path / "runs/tiny/scorecard.json").read_text())
    assert card["n"] == usual["n"] and "loss" in json.dumps(usual) and '"loss"' not in json.dumps(card["metrics"])
    say = ("chat", "tiny", "--say", "Item 1 is green. What colour is it?", "--max-new-tokens", "6")
    by_one, by_other = tunesmith(*say, "--engine", "llamacpp"), tunesmith(*say)
    assert by_one.code == by_other.code == 0, by_one.err
    assert by_one.out == by_other.out


def test_an_unknown_engine_is_refused(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["evaluate"] = {"engine": "lamacpp"}
    said = tunesmith("check", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "did you mean 'llamacpp'?" in said.err
