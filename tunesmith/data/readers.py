"""JSON and tables as text -> (row number, row), one at a time. What can't be read comes out as `Broken`,
never left out. The other formats: columnar.py, documents.py, labelstudio.py."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tunesmith.data.opening import LONGEST_LINE, Broken, Row, Rows, Span, lines, not_utf8, opened, shown
from tunesmith.errors import DataError

HALF = "holds half a character: an escape such as \\ud83d without its second half"


class _Twice(dict[str, Any]):
    """An object in which a key stands twice: one of the two values would be lost."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    marked = _Twice(row)
    names = [name for name, _ in pairs]
    marked.key = next(name for name in names if names.count(name) > 1)
    return marked


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is larger than any number that can be kept")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        raise ValueError("a key twice")
    return row


_strict = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_number, object_pairs_hook=_object)
_quick = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_number, object_pairs_hook=_once)


def load_json(text: str) -> Any:
    """A JSON value, strictly: no NaN or Infinity; an object with a key twice is marked (see `json_row`).

    Raises:
        ValueError, RecursionError: it is not JSON, or nested too deep.
    """
    if text.startswith("\ufeff"):
        raise ValueError("a byte-order mark within the file")
    return _strict.decode(text)


def json_row(value: Any, text: str, once: bool = False) -> Row | Broken:
    """A parsed value as a row, if nothing in it is lost or unwritable. `once`: it is known to have no key twice."""
    if not isinstance(value, dict):
        return Broken("not_an_object", f"is a JSON {type(value).__name__}, not an object", text)
    twice = None if once else _twice(value)
    if twice is not None:
        return Broken("duplicate_key", f"has the key '{twice}' twice", text)
    return Broken("half_character", HALF, text) if _half_characters(value, text) else value


def _twice(value: Any) -> str | None:
    if isinstance(value, _Twice):
        return value.key
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((key for part in inner if (key := _twice(part)) is not None), None)


def _half_characters(row: Row, text: str) -> bool:
    r"""Whether JSON escapes leave half a character (\ud83d alone), which no tokenizer or UTF-8 file can hold."""
    if not _escaped(text):
        return False
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _escaped(text: str) -> bool:
    """Whether JSON has an escape that may be half a character."""
    return "\\ud" in text or "\\uD" in text


def json_rows(values: list[Any], text: str) -> Rows:
    """The rows of a JSON file that holds a list of them; `text` is the file's."""
    escaped = "\\ud" if _escaped(text) else ""  # looked for once, not in each row
    for number, value in enumerate(values, 1):
        row = json_row(value, escaped)
        if isinstance(row, Broken):
            row = Broken(row.reason, row.why.replace("a JSON ", "a "), json.dumps(value))
        yield number, row


def read_jsonl(path: Path, span: Span | None = None) -> Rows:
    """One JSON object a line; row numbers are line numbers. Blank lines are not rows."""
    first = span.first if span else 1
    with opened(path, span) as file:
        for number, line in enumerate(lines(path, file, first == 1), first):
            if isinstance(line, Broken):
                yield number, line
            elif line.strip():
                yield number, _parse(line)


def _parse(line: str) -> Row | Broken:
    text = line.rstrip("\r\n")
    if not_utf8(text):
        return Broken("not_utf8", "is not UTF-8", shown(text))
    try:
        return json_row(_quick.decode(text), text, once=True)
    except (ValueError, RecursionError):  # looked at again, to tell what it is
        pass
    try:
        value = load_json(text)
    except (ValueError, RecursionError) as error:
        return Broken("broken_json", f"is not JSON ({error})", text)
    return json_row(value, text)


def load_file(path: Path) -> tuple[Any, str]:
    """A whole JSON file: (its value, its text).

    Raises:
        DataError: it is not JSON or not UTF-8; names the line.
    """
    with opened(path) as file:
        pieces = []
        for number, line in enumerate(lines(path, file), 1):
            if isinstance(line, Broken):
                raise DataError(line.why, where=f"{path}:{number}", fix="Write one object a line, as .jsonl.")
            if not_utf8(line):
                raise DataError("is not UTF-8", where=f"{path}:{number}", fix="Save the file as UTF-8.")
            pieces.append(line)
    text = "".join(pieces)
    if not text.strip():
        return [], text
    try:
        return load_json(text), text
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"is not JSON ({error})",
            where=f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path),
            fix="Mend it there; one object a line is called .jsonl.",
        ) from error


def read_json(path: Path) -> Rows:
    """A JSON list of objects (or of texts), or an object with one such list in it."""
    value, text = load_file(path)
    if isinstance(value, dict):
        if (twice := _twice(value)) is not None and isinstance(value, _Twice):
            raise DataError(f"has the key '{twice}' twice", where=str(path), fix="Rename one of the two.")
        # A lone conversation is a row itself, not a list of rows.
        inner = [v for k, v in value.items() if isinstance(v, list) and k not in ("messages", "conversations")]
        value = inner[0] if len(inner) == 1 else [value]
    if not isinstance(value, list):
        raise DataError("holds no list of rows", where=str(path), fix="Expected a JSON list of objects.")
    if all(isinstance(row, str) for row in value):
        value = [{"text": row} for row in value]
    yield from json_rows(value, text)


def read_csv(path: Path, delimiter: str = ",") -> Rows:
    """A header and rows; row numbers are the line on which a row begins (the header's is 1). Semicolons part the fields
    where the header has some and no comma."""
    with opened(path) as file:
        source = lines(path, file)
        first = list(islice(source, 1))
        if delimiter == "," and first and isinstance(first[0], str) and "," not in first[0] and ";" in first[0]:
            delimiter = ";"
        records = _records(chain(first, source), delimiter)
        at, header, text = next(records, (1, [], ""))
        if isinstance(header, Broken):
            raise DataError(f"its header {header.why}", where=f"{path}:{at}", fix="Mend the header there.")
        if not_utf8(text):
            raise DataError("its header is not UTF-8", where=f"{path}:{at}", fix="Save the file as UTF-8.")
        if len(set(header)) != len(header):
            raise DataError(
                f"two columns have the same name ({', '.join(header)})", where=f"{path}:{at}", fix="Rename one."
            )
        for at, values, text in records:
            if isinstance(values, Broken):
                yield at, values
            elif len(values) != len(header):
                why = f"has {len(values)} fields where the header has {len(header)}"
                yield at, Broken("broken_csv", why, shown(text))
            elif not_utf8(text):
                yield at, Broken("not_utf8", "is not UTF-8", shown(text))
            else:
                yield at, dict(zip(header, values, strict=True))


def _records(source: Iterator[str | Broken], delimiter: str) -> Iterator[tuple[int, list[str] | Broken, str]]:
    """The records of a CSV file that are not blank: (line, fields or what is wrong with it, as it stands there).

    Where a quote opens that never closes well, only its first line is given up: the lines after it are read
    anew, so that one stray quote costs one row.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    ahead: deque[str | Broken] = deque()
    at = 1

    def more() -> str | Broken | None:
        return ahead.popleft() if ahead else next(source, None)

    while (first := more()) is not None:
        if isinstance(first, Broken):
            yield at, first, first.text
            at += 1
            continue
        taken, size, over = [first], len(first), False

        def taking(taken: list[str] = taken) -> Iterator[str]:
            nonlocal size, over
            yield taken[0]
            while size <= LONGEST_LINE and (line := more()) is not None:
                if isinstance(line, Broken):
                    ahead.appendleft(line)
                    break
                taken.append(line)
                size += len(line)
                yield line
            over = size > LONGEST_LINE

        values: list[str] | Broken
        try:
            values = next(csv.reader(taking(), delimiter=delimiter, strict=True))
        except StopIteration:
            values = []
        except csv.Error as error:
            why = f"is not CSV ({error})"
            if "unexpected end" in str(error):
                why = f"is not CSV (a quote opens here and is never closed{' within 16 MB' if over else ''})"
            ahead.extendleft(reversed(taken[1:]))
            del taken[1:]
            values = Broken("broken_csv", why, shown(first.rstrip("\r\n")))
        text = "".join(taken).rstrip("\r\n")
        if text.strip():
            yield at, values, text
        at += len(taken)


def read_tsv(path: Path) -> Rows:
    """As CSV, with tabs."""
    return read_csv(path, "\t")
