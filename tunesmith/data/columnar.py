"""Parquet and Arrow files -> rows, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.opening import PACKED, Rows
from tunesmith.data.values import plain
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
            odd = [field.name for field in batch.schema if not _is_plain(field.type)]
            for row in batch.to_pylist():
                number += 1
                yield number, row | {name: plain(row[name]) for name in odd} if odd else row
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:  # damage shows as any of these
        raise DataError(f"is not {kind}, or damaged ({error})", where=str(path), fix="Check the file.") from error


def _is_plain(kind: Any) -> bool:
    """Whether a column's values are JSON's as they are. Numbers with a point are not: they may be NaN."""
    import pyarrow.types as of

    if of.is_struct(kind):
        return all(_is_plain(kind.field(i).type) for i in range(kind.num_fields))
    if of.is_list(kind) or of.is_large_list(kind):
        return _is_plain(kind.value_type)
    known = (of.is_string, of.is_large_string, of.is_integer, of.is_boolean, of.is_null)
    return any(is_one(kind) for is_one in known)
