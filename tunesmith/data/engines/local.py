"""`data.engine: local`: processes of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field

from tunesmith.data.engines.engine import Engine, Running, call, results, saved
from tunesmith.data.groups import equal
from tunesmith.errors import MachineError

T = TypeVar("T")
R = TypeVar("R")
COLUMNS = 4  # of keys that are held in memory at once
ALONE = 20_000  # rows; starting processes takes longer than so many


class Local(Engine):
    """Processes of this machine. Small sets stay in this one."""

    kind: Literal["local"] = "local"
    processes: int | None = Field(None, ge=1)
    """How many; one a core if not given, and none but this one for less than 20,000 rows."""

    @contextmanager
    def start(self, folder: Path) -> Iterator[Running]:
        running = LocalRunning(folder, self.processes)
        try:
            yield running
        finally:
            running.stop()


@dataclass(frozen=True)
class Shared:
    """Finds the rows that share a key of some columns: of each column as `Running.groups` gives them."""

    bands: Sequence[Path]

    def __call__(self, names: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        import pyarrow.parquet as pq

        files = (pq.ParquetFile(path) for path in self.bands)
        read = [file.read(columns=["row", *names], use_threads=False) for file in files]
        row, *columns = (np.concatenate([table[name].to_numpy() for table in read]) for name in ("row", *names))
        return [(row[places], sizes) for places, sizes in map(equal, columns)]


class LocalRunning:
    def __init__(self, folder: Path | None = None, processes: int | None = None) -> None:
        """Without a folder, in this process alone."""
        self._folder, self._wanted, self._started = folder, processes, False

    def map(self, work: Callable[[T], R], items: Sequence[T], rows: int) -> Iterator[R]:
        wanted = self._wanted or (None if rows > ALONE else 1)
        if wanted == 1 or len(items) < 2 or self._folder is None:
            yield from map(work, items)
            return
        import joblib
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        path = saved(work, self._folder)
        self._started = True
        try:
            with joblib.parallel_config(
                "loky", n_jobs=min(wanted or joblib.cpu_count(), len(items)), inner_max_num_threads=1
            ):
                parallel = joblib.Parallel(return_as="generator", batch_size=1, pre_dispatch="2*n_jobs")
                yield from results(parallel(joblib.delayed(call)(path, item) for item in items))
        except TerminatedWorkerError as error:
            raise MachineError(
                "a process that prepared rows has ended, most likely for want of memory",
                where="data.engine",
                fix="Give fewer processes: engine: {kind: local, processes: 1}",
            ) from error

    def groups(self, bands: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        import pyarrow.parquet as pq

        names = [name for path in bands[:1] for name in pq.read_schema(path).names if name != "row"]
        some = [names[at : at + COLUMNS] for at in range(0, len(names), COLUMNS)]
        for found in self.map(Shared(bands), some, sum(pq.read_metadata(path).num_rows for path in bands)):
            yield from found

    def stop(self) -> None:
        if self._started:
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True)
