"""`data.engine: spark`: PySpark, on a cluster or in this machine's processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import Field

from tunesmith.data.engines.engine import Engine, Running, call, results, saved
from tunesmith.errors import MachineError, first_line

T = TypeVar("T")
R = TypeVar("R")
AT_ONCE = 65_536  # groups that are handed on together


class Spark(Engine):
    """PySpark 4 on Java 17 or later. Its workers must see the run's folder and the sources under the same paths."""

    kind: Literal["spark"] = "spark"
    master: str = "local[*]"
    """Of a cluster, as spark://host:7077 or yarn; this machine's cores if not given."""
    settings: dict[str, str] = Field(default_factory=dict)
    """Further settings of Spark, as spark.driver.memory: 4g."""

    @contextmanager
    def start(self, folder: Path) -> Iterator[Running]:
        try:
            from pyspark.errors import PySparkException
            from pyspark.sql import SparkSession
        except ImportError as error:
            raise MachineError(
                f"needs {error.name or 'pyspark'}, which is not installed",
                where="data.engine",
                fix="pip install 'tunesmith[spark]'",
            ) from error
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        ours = SparkSession.getActiveSession() is None
        builder = SparkSession.builder.appName("tunesmith").master(self.master)
        settings = {
            "spark.executorEnv.PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "ERROR",
        }
        if self.master.startswith("local"):
            settings |= {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1"}
        for name, value in (settings | self.settings).items():
            builder = builder.config(name, value)
        try:
            session = builder.getOrCreate()
        except (PySparkException, RuntimeError, OSError) as error:
            raise MachineError(
                f"Spark can't be started or reached ({first_line(error)})",
                where="data.engine",
                fix="Spark needs Java 17 or later: set JAVA_HOME to where it lies. Check data.engine.master.",
            ) from error
        try:
            yield SparkRunning(folder, session)
        finally:
            if ours:
                session.stop()


class SparkRunning:
    def __init__(self, folder: Path, session: Any) -> None:
        self._folder, self._session = folder, session

    def map(self, work: Callable[[T], R], items: Sequence[T], rows: int) -> Iterator[R]:
        if len(items) < 2:  # nothing to share out
            yield from map(work, items)
            return
        path = saved(work, self._folder)
        told = self._session.sparkContext.parallelize(list(items), len(items)).map(lambda item: call(path, item))
        yield from results(told.collect())

    def groups(self, bands: Sequence[Path]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from pyspark.sql import functions as f

        if not bands:
            return
        table = self._session.read.parquet(*(path.absolute().as_uri() for path in bands))
        names = [name for name in table.columns if name != "row"]
        keys = [f.struct(f.lit(number).alias("column"), f.col(name).alias("key")) for number, name in enumerate(names)]
        long = table.select("row", f.explode(f.array(*keys)).alias("at")).select("row", "at.column", "at.key")
        shared = long.groupBy("column", "key").agg(f.collect_list("row").alias("rows")).where(f.size("rows") > 1)
        told = shared.select("rows").toLocalIterator()
        while some := [found[0] for found in islice(told, AT_ONCE)]:
            sizes = np.array([len(rows) for rows in some], dtype=np.int64)
            yield np.fromiter(chain.from_iterable(some), dtype=np.int64, count=int(sizes.sum())), sizes
