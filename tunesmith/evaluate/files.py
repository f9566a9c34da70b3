"""Files that a recipe's `evaluate` names."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError


def local_file(name: str, folder: Path) -> Path:
    """A file that a recipe names, relative to the recipe's folder; may hold ${VARIABLES}."""
    path = folder / Path(os.path.expandvars(name)).expanduser()
    if not path.is_file():
        raise DataError(f"no such file: {path}", where="evaluate", fix="Paths are relative to the recipe's folder.")
    return path


def json_in(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: it is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"is not JSON ({error})", where=str(path), fix="Mend the file.") from error


def rows_of(path: Path, needs: Collection[str], what: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl or .csv file, each with the columns `needs`.

    Args:
        what: whose rows they are, for errors.

    Raises:
        DataError: there are none, or one can't be read or lacks a column; names the line.
    """
    found = _csv(path) if path.suffix == ".csv" else _jsonl(path)
    if not found:
        raise DataError("holds no rows", where=str(path), fix=f"Give {what}.")
    for number, row in found:
        lacking = [key for key in needs if row.get(key) is None]
        if lacking:
            raise DataError(
                f"lacks '{lacking[0]}', which {what} have (it has: {', '.join(map(str, row))})",
                where=f"{path.name}:{number}",
                fix=f"Give {what}, or mend the file.",
            )
    return [row for _, row in found]


def _csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            return [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"can't be read ({error})", where=str(path), fix="Save it as CSV in UTF-8.") from error


def _jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 ({error})", where=str(path), fix="Save it as UTF-8.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON ({error})", where=f"{path.name}:{number}", fix="Mend the line.") from error
        if not isinstance(row, dict):
            raise DataError("is no JSON object", where=f"{path.name}:{number}", fix="Give one object a line.")
        found.append((number, row))
    return found
