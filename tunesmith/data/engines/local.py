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
KEYS_HELD = 2**29  # bytes that keys take in all processes together
A_KEY = 64  # bytes that a row and its key take while they are brought together
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
    """Finds the rows that share a key, and leaves them in a file beside the bands: what waits to be looked at takes no
    memory. The item is (a column, which part of its keys, into how many they are parted)."""

    bands: Sequence[Path]

    def __call__(self, item: tuple[str, int, int]) -> Path:
        import pyarrow.parquet as pq

        name, part, parts = item
        rows, keys = [], []
        for path in self.bands:
            table = pq.ParquetFile(path).read(columns=["row", name], use_threads=False)
            row, key = table["row"].to_numpy(), table[name].to_numpy()
            if parts > 1:
                its = key.view(np.uint64) % np.uint64(parts) == part
                row, key = row[its], key[its]
            rows.append(row)
            keys.append(key)
        row, key = np.concatenate(rows), np.concatenate(keys)
        del rows, keys
        places, sizes = equal(key)
        found = self.bands[0].with_name(f"found-{name}-{part}")
        with found.open("wb") as file:
            np.save(file, row[places])
            np.save(file, sizes)
        return found


class LocalRunning:
    def __init__(self, folder: Path | None = None, processes: int | None = None) -> None:
        """Without a folder, in this process alone."""
        self._folder, self._wanted, self._started = folder, processes, False

    def map(self, work: Callable[[T], R], items: Sequence[T], rows: int) -> Iterator[R]:
        processes = min(self._processes(rows), len(items))
        if processes < 2 or self._folder is None:
            yield from map(work, items)
            return
        import joblib
        from joblib.externals.loky.process_executor import TerminatedWorkerError

        path = saved(work, self._folder)
        self._started = True
        try:
            with joblib.parallel_config("loky", n_jobs=processes, inner_max_num_threads=1):
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
        rows = sum(pq.read_metadata(path).num_rows for path in bands)
        held = A_KEY * rows * (self._processes(rows) + 1)  # a column in each process, and one that is looked at here
        parts = -(-held // KEYS_HELD)
        items = [(name, part, parts) for name in names for part in range(parts)]
        for found in self.map(Shared(bands), items, rows):
            with found.open("rb") as file:
                together = np.load(file), np.load(file)
            found.unlink()
            yield together

    def _processes(self, rows: int) -> int:
        """How many work on so many rows."""
        if self._folder is None or (self._wanted is None and rows <= ALONE):
            return 1
        import joblib

        return self._wanted or joblib.cpu_count()

    def stop(self) -> None:
        if self._started:
            from joblib.externals.loky import get_reusable_executor

            get_reusable_executor().shutdown(wait=True)
