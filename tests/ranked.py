"""Several training runs in one process, or in one pair of them under torchrun: most of the time goes into imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


class Paired(Ranks):
    """One of two ranks that are threads of this process."""

    def __init__(self, rank: int, box: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, 2, rank, 2)
        self._box, self._barrier = box, barrier

    def all(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait()
        found = list(self._box)
        self._barrier.wait()
        return found

    def gather(self, value: float) -> list[float]:
        return self.all(value)

    def from_main(self, made: Callable[[], Any]) -> Any:
        return self.all(made() if self.main else None)[0]


def in_pair(act: Callable[[Ranks], Any]) -> list[Any]:
    """What each of two ranks returns of `act`."""
    box, barrier = [None, None], threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(act, [Paired(rank, box, barrier) for rank in range(2)]))


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
