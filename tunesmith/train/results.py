"""Where tuned weights go."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from tunesmith.models.load import CLASSES, mark_base
from tunesmith.models.resolve import ResolvedModel
from tunesmith.runs import Run, whole_folder, write_json
from tunesmith.train.checkpoints import State
from tunesmith.train.parallel.alone import Alone
from tunesmith.train.section import TrainSection


def best_of(run: Run) -> Path:
    """Where the best weights so far lie."""
    return run.stage("train") / "best"


def save(section: TrainSection, split: Alone, target: Path) -> None:
    """Write the tuned weights; every rank gives its part, the first one writes."""
    with split.whole() as model:
        if split.ranks.main:
            with whole_folder(target) as folder:
                section.adapter.save(model, folder)


def keep_weights(
    section: TrainSection, state: State, split: Alone, base: ResolvedModel, classes: list[str], run: Run
) -> None:
    """Write the best weights, or the last, to where the next stages look for them."""
    target = run.stage("train") / ("model" if section.adapter.whole_model else "adapter")
    best = best_of(run) if section.keep_best and state.best_step is not None else None
    with split.whole() if best is None else contextlib.nullcontext(split.model) as model:
        if not split.ranks.main:
            return
        with whole_folder(target) as folder:
            if best is None:
                section.adapter.save(model, folder)
            else:
                shutil.copytree(best, folder, dirs_exist_ok=True)
            _mark(section, folder, split, base, classes)


def snapshot(
    section: TrainSection, state: State, split: Alone, base: ResolvedModel, classes: list[str], run: Run
) -> None:
    """Write the weights as they are now to `step-N`, and remove all but the newest `section.snapshots`."""
    with split.whole() as model:
        if not split.ranks.main:
            return
        with whole_folder(run.snapshots / f"step-{state.step:06d}") as folder:
            section.adapter.save(model, folder)
            _mark(section, folder, split, base, classes)
    for old in sorted(run.snapshots.glob("step-*"))[: -section.snapshots]:
        shutil.rmtree(old)


def _mark(section: TrainSection, folder: Path, split: Alone, base: ResolvedModel, classes: list[str]) -> None:
    """Write beside weights what they are of: the classes of their head, and their base."""
    if classes:
        write_json(folder / CLASSES, {"classes": classes, "pad_token_id": split.model.config.pad_token_id})
    if not section.adapter.whole_model:
        mark_base(folder, base)
