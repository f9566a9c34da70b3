"""`data.engine: local`: processes of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from pydantic import Field

from tunesmith.data.engines.engine import Engine, Running, call, results, saved
from tunesmith.data.groups import equal
from tunesmith.errors import MachineError

T = TypeVar("T")
R = TypeVar("R")
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

        files = [pq.ParquetFile(path) for path in bands[:1]]
        names = [name for name in files[0].schema_arrow.names if name != "row"] if files else []

        def column(name: str) -> np.ndarray:
            return np.concatenate([pq.read_table(path, columns=[name])[name].to_numpy() for path in bands])

        rows = column("row") if names else np.empty(0, dtype=np.int64)
        for name in names:
            places, sizes = equal(column(name))
            yield rows[places], sizes

    def stop(self) -> None:
        if self._started:
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True)
