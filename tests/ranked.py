"""Several training runs in one process, or in one pair of them under torchrun: most of the time goes into imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tunesmith
from tunesmith.train.ranks import Ranks

ROOT = Path(__file__).parents[1]
RUNS = Sequence[tuple[str, Sequence[str], str]]


def walk(recipe: Path, folder: Path, runs: RUNS) -> None:
    """Train each of `runs`: its name, what is set, and the run that it goes on from ('' for none)."""
    for name, sets, origin in runs:
        if origin and Ranks.of_environment().main:
            shutil.copytree(folder / origin, folder / name)
            cut(folder / name / "tiny/train", 4)
        tunesmith.run(recipe, sets, folder / name, ("data", "train"))


def shared(recipe: Path, runs: RUNS) -> None:
    """The runs, by two ranks that a user's own torchrun starts."""
    given = [__file__, str(recipe), str(recipe.parent / "runs"), json.dumps(runs)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def cut(train: Path, step: int) -> None:
    """Leave what a kill after a step would have left."""
    (train / "manifest.json").unlink()
    for folder in train.iterdir():
        if folder.name in ("adapter", "model"):
            shutil.rmtree(folder)
    for checkpoint in (train / "checkpoints").iterdir():
        if int(checkpoint.name[-6:]) > step:
            shutil.rmtree(checkpoint)


if __name__ == "__main__":
    walk(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
