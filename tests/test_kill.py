"""A whole run, killed between any two things that it does to its files, ends as one that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe

# The command line, but the process dies just before its n-th rename or removal.
DYING = """
import os, shutil, sys
left = int(sys.argv.pop(1))
def counted(plain):
    def act(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os._exit(9)
        return plain(*arguments, **options)
    return act
os.replace, shutil.rmtree = counted(os.replace), counted(shutil.rmtree)
from tunesmith.cli import main
try:
    main()
finally:
    print(-left, file=sys.stderr)
"""


def go(path: Path, runs: Path, dies_at: int) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", DYING, str(dies_at), "run", str(path), "--runs", str(runs), "--json"]
    return subprocess.run(arguments, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tries", [1, pytest.param(12, marks=pytest.mark.long)])
def test_a_run_killed_between_two_renames_ends_as_any_other(recipe: dict[str, Any], tmp_path: Path, tries: int) -> None:
    path = write_recipe(tmp_path, recipe)
    calm = go(path, tmp_path / "calm", -1)
    assert calm.returncode == 0, calm.stdout
    acts = int(calm.stderr.split()[-1]) - 1
    assert acts > 20
    random.seed(os.getpid())
    for dies_at in random.sample(range(1, acts), tries):
        killed = go(path, tmp_path / str(dies_at), dies_at)
        assert killed.returncode == 9, dies_at
        again = go(path, tmp_path / str(dies_at), -1)
        assert again.returncode == 0, (dies_at, again.stdout)
        one, other = tmp_path / "calm/tiny", tmp_path / str(dies_at) / "tiny"
        for file in ("train/adapter/adapter_model.safetensors", "package/model/model.safetensors", "scorecard.json"):
            assert (one / file).read_bytes() == (other / file).read_bytes(), (dies_at, file)
        stages = json.loads((other / "manifest.json").read_text())["stages"]
        assert set(stages) == {"data", "train", "evaluate", "package"}
        assert (other / "report.html").is_file() and (other / "README.md").is_file()
