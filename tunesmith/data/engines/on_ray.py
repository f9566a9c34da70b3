"""`data.engine: ray`: Ray Data, on a cluster or on one that is started here."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from tunesmith.data.engines.engine import Engine, Running, call, results, saved
from tunesmith.data.groups import equal
from tunesmith.errors import MachineError, first_line

T = TypeVar("T")
R = TypeVar("R")
PARTITIONS = 4  # of keys, a core


class Ray(Engine):
    """Ray Data. Its workers must see the run's folder and the sources under the same paths."""

    kind: Literal["ray"] = "ray"
    address: str | None = None
    """Of a cluster, as ray://host:10001 or auto; one is started on this machine if not given."""

    @contextmanager
    def start(self, folder: Path) -> Iterator[Running]:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise MachineError(
                f"needs {error.name or 'ray'}, which is not installed",
                where="data.engine",
                fix="pip install 'tunesmith[ray]'",
            ) from error
        ours = not ray.is_initialized()
        if ours:
            paths = os.pathsep.join(p for p in sys.path if p)
            try:
                ray.init(
                    address=self.address or "local",
                    include_dashboard=False if self.address is None else None,
                    log_to_driver=False,
                    logging_level="error",
                    runtime_env={"env_vars": {"PYTHONPATH": paths}},
                )
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                raise MachineError(
                    f"Ray can't be started or reached ({first_line(error)})",
                    where="data.engine",
                    fix="Check data.engine.address, or leave it out.",
                ) from error
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        try:
            yield RayRunning(folder)
        finally:
            if ours:
                ray.shutdown()


class RayRunning:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def map(self, work: Callable[[T], R], items: Sequence[T], rows: int) -> Iterator[R]:
        import ray.data

        if len(items) < 2:  # nothing to share out
            yield from map(work, items)
            return
        path = saved(work, self._folder)

        def done(row: dict[str, Any]) -> dict[str, Any]:
            return {"number": row["number"], "result": pickle.dumps(call(path, pickle.loads(row["item"])))}

        given = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
        told = ray.data.from_items(given, override_num_blocks=len(given)).map(done).take_all()
        in_order = sorted(told, key=lambda row: int(row["number"]))
        yield from results(pickle.loads(row["result"]) for row in in_order)

    def groups(self, bands: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        import ray
        import ray.data

        if not bands:
            return
        partitions = max(int(PARTITIONS * ray.cluster_resources().get("CPU", 1)), 1)

        def keys(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            names = sorted(name for name in table if name != "row")
            column = np.repeat(np.arange(len(names)), len(table["row"]))
            key = np.concatenate([table[name] for name in names])
            return {
                "part": (key.view(np.uint64) % np.uint64(partitions)).astype(np.int64),
                "column": column,
                "key": key,
                "row": np.tile(table["row"], len(names)),
            }

        def shared(table: dict[str, np.ndarray]) -> dict[str, Any]:
            found, counts = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
            for number in np.unique(table["column"]).tolist():
                within = np.flatnonzero(table["column"] == number)
                places, sizes = equal(table["key"][within])
                found.append(table["row"][within[places]])
                counts.append(sizes)
            told = {"rows": found, "sizes": counts}
            return {name: np.array([np.concatenate(t).tobytes()], dtype=object) for name, t in told.items()}

        told = (
            ray.data.read_parquet([str(path) for path in bands])
            .map_batches(keys, batch_format="numpy")
            .groupby("part", num_partitions=partitions)
            .map_groups(shared, batch_format="numpy")
        )
        for row in told.iter_rows():
            yield np.frombuffer(row["rows"], dtype=np.int64), np.frombuffer(row["sizes"], dtype=np.int64)
