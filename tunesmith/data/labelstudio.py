"""Label Studio: tasks out, exports in.

An export is a list of tasks, each with `data` (what people saw) and `annotations` (what each of them said:
`result`, a list of {from_name, to_name, type, value}). Source: labelstud.io/guide/export, "Label Studio JSON".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.opening import Broken, Row, Rows, unbroken
from tunesmith.data.readers import json_rows, load_file
from tunesmith.errors import DataError


def read_label_studio(path: Path) -> Rows:
    """A task is a row: its data's columns, and one for each control (`from_name`) with what most people said.

    A task that nobody finished, or on which as many say one thing as another, comes out as Broken.
    """
    for number, task in _tasks(path):
        yield number, task if isinstance(task, Broken) else _agreed(task)


def judgements(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Every annotation of an export: (item, annotator, control, label).

    Raises:
        DataError: a task can't be read.
    """
    for _, task in unbroken(_tasks(path), path):
        for annotation in _finished(task):
            who = annotation.get("completed_by", annotation.get("id", ""))
            who = who.get("email", who.get("id")) if isinstance(who, dict) else who
            for control, value in _said(annotation).items():
                yield str(task.get("id", "")), str(who), control, value


def _tasks(path: Path) -> Rows:
    value, text = load_file(path)
    if not isinstance(value, list) or not any(is_task(task) for task in value):
        raise DataError(
            "is no Label Studio export", where=str(path), fix="Export as JSON (not JSON-MIN): tasks with annotations."
        )
    for number, row in json_rows(value, text):
        if isinstance(row, dict) and not is_task(row):
            row = Broken("not_a_task", "has no `data` and `annotations`", json.dumps(row, ensure_ascii=False)[:2000])
        yield number, row


def is_task(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("data"), dict) and isinstance(row.get("annotations"), list)


def _agreed(task: Row) -> Row | Broken:
    told = json.dumps(task, ensure_ascii=False)
    votes: dict[str, Counter[str]] = {}
    for annotation in _finished(task):
        for control, value in _said(annotation).items():
            votes.setdefault(control, Counter())[value] += 1
    if not votes:
        return Broken("not_annotated", "nobody has finished this task", told)
    for control, counts in votes.items():
        first, *others = counts.most_common(2)
        if others and others[0][1] == first[1]:
            why = f"annotators disagree on '{control}': {', '.join(f'{v} ({n})' for v, n in counts.most_common())}"
            return Broken("annotators_disagree", why, told)
    return task["data"] | {control: counts.most_common(1)[0][0] for control, counts in votes.items()}


def _finished(task: Row) -> list[Row]:
    return [a for a in task["annotations"] if isinstance(a, dict) and not a.get("was_cancelled") and a.get("result")]


def _said(annotation: Row) -> dict[str, str]:
    """What one annotation says by control: its choice or text as it is, anything with places in it as JSON."""
    said: dict[str, list[Any]] = {}
    results = annotation["result"] if isinstance(annotation["result"], list) else []
    for part in results:
        if not (isinstance(part, dict) and isinstance(part.get("value"), dict)):
            continue
        value, kind = part["value"], str(part.get("type", ""))
        inner = value.get({"choices": "choices", "textarea": "text", "rating": "rating"}.get(kind, kind), value)
        placed = {"start", "end", "x", "y"} & set(value)
        said.setdefault(str(part.get("from_name", kind)), []).append(value if placed else inner)
    return {control: _written(values) for control, values in said.items()}


def _written(values: list[Any]) -> str:
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    if len(flat) == 1 and not isinstance(flat[0], dict):
        return str(flat[0])
    return json.dumps(flat, ensure_ascii=False, separators=(",", ":"))
