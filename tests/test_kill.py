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
from tests.test_method_runs import METHODS, files, to_train
from tunesmith.runs import read_jsonl

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


# Forks a child for each run, so that a run costs no imports; the random moments come from the parent.
FORKING = """
import json, os, random, signal, sys, time
import peft, torch, transformers
import tunesmith.jobs, tunesmith.pipeline
from tunesmith import cli

torch.set_num_threads(1)

def start(path, runs):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        sys.argv = ["tunesmith", "train", path, "--runs", runs]
        os.dup2(2, 1)
        try:
            cli.main()
        except SystemExit as stop:
            os._exit(stop.code or 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return child

for path, runs in (line.split("\t") for line in sys.argv[1:]):
    began = time.monotonic()
    _, calm = os.waitpid(start(path, runs + "/calm"), 0)
    took, kills = time.monotonic() - began, 0
    while True:
        child, wait = start(path, runs + "/stormy"), random.uniform(0.1, 0.9) * took
        until = time.monotonic() + (wait if kills < 2 else 600)
        done = 0
        while not done and time.monotonic() < until:
            time.sleep(0.002)
            done, code = os.waitpid(child, os.WNOHANG)
        if done:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    print(json.dumps([calm, code, kills]))
"""
STORMS: dict[str, dict[str, Any]] = {
    "dpo": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1}},
    "kto": {"adapter": {"kind": "prefix", "tokens": 4}},
    "classify": {"optimizer": "muon"},
    "distill": {"adapter": "full", "optimizer": "schedule_free"},
    "text": {"adapter": {"kind": "adalora", "rank": 2, "warm": 0.1, "settled": 0.2}, "neftune": 5},
    "cpo": {"adapter": {"kind": "lora", "rank": 4, "dropout": 0.1, "dora": True}, "optimizer": "lion"},
    "simpo": {"adapter": {"kind": "bottleneck", "size": 8}},
    "orpo": {"adapter": {"kind": "partial", "last_layers": 1}, "precision": "bfloat16"},
    "reward": {"adapter": {"kind": "lora", "rank": 4}, "optimizer": "adafactor"},
}


LONG_STORMS = [["kto", "classify", "distill"], ["cpo", "simpo", "orpo", "reward"]]


def test_every_method_but_sft_which_has_its_own_is_killed() -> None:
    assert {"dpo", "text", *(method for some in LONG_STORMS for method in some)} == set(STORMS) == set(METHODS)


@pytest.mark.parametrize(
    "methods", [["dpo", "text"], *(pytest.param(some, marks=pytest.mark.long) for some in LONG_STORMS)], ids=" ".join
)
def test_other_methods_killed_at_random_moments_end_in_the_same_weights(
    recipe: dict[str, Any], tmp_path: Path, tiny_model: Path, methods: list[str]
) -> None:
    """Up to two kills each, wherever they fall: in the data stage, the tried step, a step, a checkpoint, the end."""
    lines = []
    for method in methods:
        folder = tmp_path / method
        folder.mkdir()
        mine = json.loads(json.dumps(recipe))
        mine["data"]["sources"] = [{"path": str(folder / "rows.jsonl")}]
        to_train(mine, method, folder, tiny_model, max_steps=12, epochs=9, learning_rate=0.003, **STORMS[method])
        lines.append(f"{write_recipe(folder, mine)}\t{folder}")
    done = subprocess.run([sys.executable, "-c", FORKING, *lines], capture_output=True, text=True, check=False)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(lines) and all(calm == code == 0 for calm, code, _ in told), done.stderr[-2000:]
    assert sum(kills for _, _, kills in told) >= len(lines)
    for method in methods:
        calm, stormy = (tmp_path / method / name / "tiny" for name in ("calm", "stormy"))
        weights = files(calm)
        assert weights and weights == files(stormy), method
        steps = [[(x["step"], x["loss"]) for x in read_jsonl(run / "metrics.jsonl")] for run in (calm, stormy)]
        assert steps[0] == steps[1] and len(steps[0]) == 12, method
