"""Checkpoints: weights, optimizer, random states and position, in safetensors and JSON, whole or not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tunesmith.errors import RunError
from tunesmith.progress import say
from tunesmith.runs import read_json, whole_folder, write_json
from tunesmith.train.parallel.alone import Alone

# Of what a checkpoint holds and means. Whoever changes that raises it, so that no code reads another's.
FORMAT = 2


@dataclass
class State:
    """Where a run is.

    Attributes:
        step: optimizer steps taken.
        tokens, seconds: what went through them, and how long that took.
        best_step, best_loss, best_value: the best validation so far, if any was taken: its loss, and its value of what
            `train.best_by` names.
        stale: validations since then.
        precision, threads: what the steps so far were computed with; going on keeps the precision.
    """

    precision: str
    threads: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    best_value: float | None = None
    stale: int = 0


def save(
    folder: Path,
    state: State,
    split: Alone,
    keep: int,
    extra: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write `step-N`, with what the adapter keeps besides its weights, and remove all but the newest `keep`. Every rank
    gives its part, the first one writes."""
    tensors, facts = split.state()
    tensors |= {f"adapter/{name}": value.detach().contiguous() for name, value in (extra or {}).items()}
    states = split.ranks.all({kind: get() for kind, (get, _) in _random().items()})
    for rank, found in enumerate(states):
        tensors |= {f"random/{kind}{_of(rank)}": value for kind, value in found.items()}
    if not split.ranks.main:
        return
    with whole_folder(folder / f"step-{state.step:06d}") as temporary:
        save_file(tensors, temporary / "state.safetensors")
        write_json(temporary / "optimizer.json", facts)
        write_json(temporary / "state.json", {"format": FORMAT} | asdict(state))
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old)


def newest(folder: Path) -> State | None:
    """Where the newest whole checkpoint is; None where there is none.

    Raises:
        RunError: other code wrote it.
    """
    for path in reversed(_all(folder)):
        try:
            told = read_json(path / "state.json")
            read_json(path / "optimizer.json")
            with safe_open(path / "state.safetensors", framework="pt"):  # the header must fit the file
                pass
        except (RunError, SafetensorError, OSError) as error:
            say(f"checkpoint {path.name} is damaged and left out ({error})")
            shutil.rmtree(path)
            continue
        written = told.pop("format", "unknown")
        if written != FORMAT:
            raise RunError(
                f"this checkpoint was written by other code (format {written}; this Tunesmith reads {FORMAT})",
                where=str(path),
                fix="Go on with the version that wrote it, or remove the run's train folder to start again.",
            )
        return State(**told)
    return None


def restore(folder: Path, state: State, split: Alone) -> dict[str, torch.Tensor]:
    """Load the checkpoint of `state` into the weights, the optimizer and the random states; returns its `extra`."""
    path = folder / f"step-{state.step:06d}"
    tensors = load_file(path / "state.safetensors")
    names = {name.removeprefix("weight/") for name in tensors if name.startswith("weight/")}
    if names != set(split.weights):
        raise RunError(
            "the checkpoint's weights are of another adapter",
            where=str(path),
            fix="Remove the run's train folder to start again.",
        )
    for name, shape in split.shapes.items():
        if tensors[f"weight/{name}"].shape != shape:
            raise RunError(
                f"the checkpoint's {name} is {list(tensors[f'weight/{name}'].shape)}, not {list(shape)}",
                where=str(path),
                fix="Remove the run's train folder to start again.",
            )
    split.load(tensors, read_json(path / "optimizer.json"))
    for kind, (_, put) in _random().items():
        found = tensors.get(f"random/{kind}{_of(split.ranks.rank)}")
        if found is not None:  # a rank that was not there before keeps the state that it started with
            put(found)
    return {n.removeprefix("adapter/"): value for n, value in tensors.items() if n.startswith("adapter/")}


def _random() -> dict[str, tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]]:
    """How each random state is read and set."""
    cuda = {"cuda": (torch.cuda.get_rng_state, torch.cuda.set_rng_state)} if torch.cuda.is_available() else {}
    return {"torch": (torch.get_rng_state, torch.set_rng_state), **cuda}


def _of(rank: int) -> str:
    return f"/{rank}" if rank else ""


def remove(folder: Path, state: State) -> None:
    """Remove the checkpoint of `state`."""
    shutil.rmtree(folder / f"step-{state.step:06d}")


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
