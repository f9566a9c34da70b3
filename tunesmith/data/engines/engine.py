"""What an engine is: it applies one piece of work to many items, and brings together rows that share a key.

Work is a picklable object that is called with an item; items and results are small (places of rows on a shelf,
counts, paths), since rows themselves lie in files that every process sees. So the work is the same code on every
engine, and the result does not depend on where it was done.
"""

from __future__ import annotations

import pickle
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, count
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tunesmith.errors import TunesmithError
from tunesmith.section import Section

T = TypeVar("T")
R = TypeVar("R")
_numbers = count()


class Running(Protocol):
    """An engine at work."""

    def map(self, work: Callable[[T], R], items: Sequence[T], rows: int) -> Iterator[R]:
        """The work's result for each item, in the items' order. `rows` says how many rows that concerns.

        Raises:
            TunesmithError: what the work raised, for the first item for which it did.
        """

    def groups(self, bands: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows that share a key in some column, many groups at a time: (the rows of one group after the other, how many
        each group has). Groups are of two and more, in any order; a row may be in many.

        Args:
            bands: Parquet files of int64 columns: `row`, and keys by any other names.
        """


class Engine(Section):
    """`data.engine`."""

    @abstractmethod
    def start(self, folder: Path) -> AbstractContextManager[Running]:
        """The engine, ready to work; `folder` is for files of its own, and seen by every process.

        Raises:
            MachineError: a library is missing, or the engine can't be reached.
        """


@dataclass(frozen=True)
class Failed:
    """What work raised, as a value, so that it comes through any engine as it is."""

    error: TunesmithError


def saved(work: Any, folder: Path) -> Path:
    """The work in a file, so that it goes to each process once and not with every item; its arrays in another, which
    all processes of a machine have in memory once."""
    path, arrays = folder / f"work-{next(_numbers)}", list[pickle.PickleBuffer]()
    content = pickle.dumps(work, 5, buffer_callback=arrays.append)
    with _arrays_of(path).open("wb") as file:
        sizes = [file.write(array.raw()) for array in arrays]
    path.write_bytes(pickle.dumps((content, sizes)))
    return path


def _arrays_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.arrays")


@lru_cache(1)
def _loaded(path: Path) -> Callable[[Any], Any]:
    content, sizes = pickle.loads(path.read_bytes())  # written by `saved` a moment ago
    held = np.memmap(_arrays_of(path), mode="r").data if any(sizes) else memoryview(b"")
    arrays = [held[end - size : end] for size, end in zip(sizes, accumulate(sizes), strict=True)]
    work: Callable[[Any], Any] = pickle.loads(content, buffers=arrays)
    return work


def call(path: Path, item: Any) -> Any:
    """The result of saved work, or what it raised."""
    try:
        return _loaded(path)(item)
    except TunesmithError as error:
        return Failed(error)


def results(found: Iterable[Any]) -> Iterator[Any]:
    """Results of `call`; the first error is raised."""
    for one in found:
        if isinstance(one, Failed):
            raise one.error
        yield one
