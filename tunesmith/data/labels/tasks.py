"""Rows -> the tasks that Label Studio imports."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.data.opening import unbroken
from tunesmith.data.section import SourceSection
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError
from tunesmith.runs import write_text


def write_tasks(data: Path, out: Path) -> int:
    """Write a file's rows as a JSON list of {data: ...}; returns how many.

    Raises:
        DataError: a row can't be read; names it.
    """
    if not data.is_file():
        raise DataError(f"no such file: {data}", where="DATA", fix="Give the file that holds your rows.")
    tasks = [{"data": row} for _, row in unbroken(read_rows(SourceSection(path=str(data)), data), data)]
    write_text(out, json.dumps(tasks, ensure_ascii=False, indent=1, default=str) + "\n")
    return len(tasks)
