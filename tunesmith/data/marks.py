"""What a row carries besides its text: its source's tag and weight, and the columns that splitting and balancing
look at.

Those columns are for the stage alone: no cleaning step changes them, so that a customer whose name is masked or made up
stays one customer, and they are written nowhere, so that the name is not. What is to be written is named in `keep`.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.conversation.message import Conversation
from tunesmith.data.layouts import Row
from tunesmith.data.section import DataSection, SourceSection
from tunesmith.data.unusable import Unusable
from tunesmith.errors import DataError


def marked(row: Conversation, raw: Row, source: SourceSection, kept: Collection[str], time: str | None) -> Conversation:
    """The row with its marks in its metadata.

    Args:
        kept, time: columns to keep, and that of times among them.

    Raises:
        Unusable: the column of times holds none.
    """
    marks: dict[str, Any] = {}
    if source.tag is not None:
        marks["tag"] = source.tag
    if source.weight != 1:
        marks["weight"] = source.weight
    columns = {name: raw[name] for name in kept if not _empty(raw.get(name))}
    if time is not None:
        columns[time] = seconds(raw.get(time), time)
    if columns:
        marks["columns"] = columns
    return replace(row, metadata=row.metadata | marks) if marks else row


def _empty(value: Any) -> bool:
    """Whether a cell holds nothing, as a table of text has it too."""
    return value is None or (isinstance(value, str) and not value.strip())


def bare(row: Conversation) -> Conversation:
    """The row as it may be written."""
    if "columns" not in row.metadata:
        return row
    return replace(row, metadata={key: value for key, value in row.metadata.items() if key != "columns"})


def column(row: Conversation, name: str) -> Any:
    """A kept column's value; None where the row had none."""
    return row.metadata.get("tag") if name == "tag" else row.metadata.get("columns", {}).get(name)


def seconds(value: Any, name: str) -> float:
    """A time as seconds: of ISO 8601 text (UTC where it names no zone), a date, or a number as it is.

    Raises:
        Unusable: it is none of these.
    """
    if isinstance(value, str):
        text = value.strip()
        try:
            value = datetime.datetime.fromisoformat(text)
        except ValueError:
            try:
                value = float(text)
            except ValueError:
                value = None
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, datetime.datetime):
        return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        return float(value)
    raise Unusable("bad_time", f"'{name}' holds no time: a number, or a date as in 2026-11-22 or 2026-11-22T08:00")


def know_columns(rows: Sequence[Conversation], section: DataSection) -> None:
    """Raise where a column that the recipe names is in no row at all."""
    for key, name in section.columns_named.items():
        if rows and name != "tag" and all(column(row, name) is None for row in rows):
            raise DataError(
                f"no row has a column '{name}' with anything in it",
                where=f"data.{key}",
                fix="Name a column of the sources' files.",
            )
