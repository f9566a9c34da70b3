"""Several training runs in one process, or in one pair of them under torchrun: most of the time goes into imports."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import tunesmith
from tunesmith.train.ranks import Ranks

RUNS = Sequence[tuple[str, Sequence[str], str]]


def walk(recipe: Path, folder: Path, runs: RUNS) -> None:
    """Train each of `runs`: its name, what is set, and the run that it goes on from ('' for none)."""
    for name, sets, origin in runs:
        if origin and Ranks.of_environment().main:
            shutil.copytree(folder / origin, folder / name)
            cut(folder / name / "tiny/train", 4)
        tunesmith.run(recipe, sets, folder / name, ("data", "train"))


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
