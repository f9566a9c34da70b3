"""Loss and gradient norm of each step are those that were kept: nothing moves a curve unnoticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import curves


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curves")


def marked(name: str) -> Any:
    """A case; a process of its own for each rank takes its time."""
    return pytest.param(name, marks=pytest.mark.long) if "ranks" in curves.CASES[name] else name


@pytest.mark.parametrize("name", map(marked, curves.CASES))
def test_a_curve_is_the_one_that_was_kept(name: str, folder: Path) -> None:
    if "quantise" in curves.CASES[name]:
        pytest.importorskip("bitsandbytes")
    before = curves.kept(name)
    kept_with, here = before["environment"]["instructions"], curves.environment()["instructions"]
    if "quantise" in curves.CASES[name] and kept_with != here:
        pytest.skip(f"bitsandbytes has other kernels for {here} than for {kept_with}, with which the curve was kept")
    assert before["case"] == curves.CASES[name], "run: python tools/golden.py"
    why = curves.moved(before["steps"], curves.trained(name, folder))
    assert not why, (
        f"{why} (kept with {before['environment']}, this is {curves.environment()}). If it should move: "
        f"python tools/golden.py {name}, and say why in the commit."
    )


def test_only_cases_are_kept_and_a_small_difference_is_noticed() -> None:
    assert {path.stem for path in curves.GOLDEN.glob("*.json")} == set(curves.CASES)
    steps = curves.kept("sft-lora")["steps"]
    assert not curves.moved(steps, steps)
    assert not curves.moved(steps, curves.kept("sft-lora-two-ranks")["steps"])  # two ranks train what one does
    other = [dict(step) for step in steps]
    other[-1]["loss"] *= 1.0003
    assert curves.moved(steps, other).startswith(f"loss of step {len(steps)} is ")
    other[-1]["loss"] = float("nan")
    assert curves.moved(steps, other) and curves.moved(steps, steps[:-1])
