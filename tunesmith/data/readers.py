"""Files -> (row number, row), one at a time. What can't be read comes out as `Broken`, never left out."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tunesmith.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Broken:
    """A row that can't be read: a reason code, what is wrong, and the text as it stands in the file."""

    reason: str
    why: str
    text: str


Rows = Iterator[tuple[int, Row | Broken]]


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.suffix.lower() == ".gz" else file


def _text(path: Path, file: BinaryIO) -> Iterator[str]:
    """Lines of a UTF-8 file; a byte that is not UTF-8 becomes a lone surrogate, for the row to be found out."""
    try:
        yield from io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"can't be unpacked ({error})",
            where=str(path),
            fix="The file is cut short or damaged; fetch it again.",
        ) from error


def _not_utf8(text: str) -> bool:
    return any("\udc80" <= c <= "\udcff" for c in text)


def _half_characters(row: Row, text: str) -> bool:
    r"""Whether JSON escapes leave half a character (\ud83d alone), which no tokenizer or UTF-8 file can hold."""
    if "\\ud" not in text and "\\uD" not in text:
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


HALF = "holds half a character: an escape such as \\ud83d without its second half"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _shown(text: str) -> str:
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_jsonl(path: Path) -> Rows:
    """One JSON object a line; row numbers are line numbers. Blank lines are not rows."""
    with _opened(path) as file:
        for number, line in enumerate(_text(path, file), 1):
            if not line.strip():
                continue
            yield number, _parse(line)


def _parse(line: str) -> Row | Broken:
    text = line.rstrip("\r\n")
    if _not_utf8(text):
        return Broken("not_utf8", "is not UTF-8", _shown(text))
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        return Broken("broken_json", f"is not JSON ({error})", text)
    if not isinstance(value, dict):
        return Broken("not_an_object", f"is a JSON {type(value).__name__}, not an object", text)
    return Broken("half_character", HALF, text) if _half_characters(value, text) else value


def read_json(path: Path) -> Rows:
    """A JSON list of objects, or an object with one such list in it."""
    with _opened(path) as file:
        text = "".join(_text(path, file))
    if not text.strip():
        return
    if _not_utf8(text):
        line = next(i for i, line in enumerate(text.split("\n"), 1) if _not_utf8(line))
        raise DataError("is not UTF-8", where=f"{path}:{line}", fix="Save the file as UTF-8.")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"is not JSON ({error})",
            where=f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path),
            fix="Mend it there; one object a line is called .jsonl.",
        ) from error
    if isinstance(value, dict):
        # A lone conversation is a row itself, not a list of rows.
        lists = [v for k, v in value.items() if isinstance(v, list) and k not in ("messages", "conversations")]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise DataError("holds no list of rows", where=str(path), fix="Expected a JSON list of objects.")
    for number, row in enumerate(value, 1):
        if not isinstance(row, dict):
            yield number, Broken("not_an_object", f"is a {type(row).__name__}, not an object", json.dumps(row))
        elif _half_characters(row, text):
            yield number, Broken("half_character", HALF, json.dumps(row))
        else:
            yield number, row


def read_csv(path: Path, delimiter: str = ",") -> Rows:
    """A header and rows; row numbers are the line on which a row begins (the header's is 1)."""
    with _opened(path) as file:
        records = _records(_text(path, file), delimiter)
        at, header, text = next(records, (1, [], ""))
        if isinstance(header, csv.Error):
            raise DataError(f"its header is not CSV ({header})", where=f"{path}:{at}", fix="Mend the quotes there.")
        if _not_utf8(text):
            raise DataError("its header is not UTF-8", where=f"{path}:{at}", fix="Save the file as UTF-8.")
        if len(set(header)) != len(header):
            raise DataError(
                f"two columns have the same name ({', '.join(header)})", where=f"{path}:{at}", fix="Rename one."
            )
        for at, values, text in records:
            if isinstance(values, csv.Error):
                yield at, Broken("broken_csv", f"is not CSV ({values})", _shown(text))
            elif len(values) != len(header):
                why = f"has {len(values)} fields where the header has {len(header)}"
                yield at, Broken("broken_csv", why, _shown(text))
            elif _not_utf8(text):
                yield at, Broken("not_utf8", "is not UTF-8", _shown(text))
            else:
                yield at, dict(zip(header, values, strict=True))


def _records(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error, str]]:
    """The records of a CSV file that are not blank: (line, fields or what is wrong with it, as it stands there)."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    taken: list[str] = []

    def taking() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line

    reader = csv.reader(taking(), delimiter=delimiter, strict=True)
    while True:
        at = reader.line_num + 1
        taken.clear()
        values: list[str] | csv.Error
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            values = error
        if isinstance(values, csv.Error) and "unexpected end" in str(values):
            values = csv.Error(f"a quote opens here and is never closed: it takes in {len(taken)} lines")
        text = "".join(taken).rstrip("\r\n")
        if text.strip():
            yield at, values, text


def read_tsv(path: Path) -> Rows:
    """As CSV, with tabs."""
    return read_csv(path, "\t")


def read_parquet(path: Path) -> Rows:
    """Rows of a Parquet file, counted from 1."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix.lower() == ".gz":
        raise DataError("a gzipped Parquet file", where=str(path), fix="Unpack it; Parquet compresses by itself.")
    try:
        number = 0
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # damage shows as any of these
        raise DataError(f"is not Parquet, or damaged ({error})", where=str(path), fix="Check the file.") from error
