"""Parquet and Arrow files -> rows, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.opening import PACKED, Rows
from tunesmith.errors import DataError


def read_parquet(path: Path) -> Rows:
    """Rows of a Parquet file, counted from 1."""
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches()

    return _rows(path, "Parquet", batches)


def read_arrow(path: Path) -> Rows:
    """Rows of an Arrow (Feather) file or stream, as `datasets` keeps them, counted from 1."""
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.OSFile(str(path)) as file:
            if file.read(6) == b"ARROW1":
                whole = pa.ipc.open_file(file)
                yield from (whole.get_batch(i) for i in range(whole.num_record_batches))
            else:
                file.seek(0)
                yield from pa.ipc.open_stream(file)

    return _rows(path, "Arrow", batches)


def _rows(path: Path, kind: str, batches: Any) -> Rows:
    import pyarrow as pa

    if path.suffix.lower() in PACKED:
        raise DataError(f"a packed {kind} file", where=str(path), fix=f"Unpack it; {kind} compresses by itself.")
    number = 0
    try:
        for batch in batches():
            names = batch.schema.names
            if len(set(names)) != len(names):
                raise DataError(
                    f"two columns have the same name ({', '.join(names)})", where=str(path), fix="Rename one."
                )
            batch.validate(full=True)  # offsets of a damaged file lead anywhere in memory
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:  # damage shows as any of these
        raise DataError(f"is not {kind}, or damaged ({error})", where=str(path), fix="Check the file.") from error
