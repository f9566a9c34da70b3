"""Who said what of which item: from a table, a wide export, or Label Studio."""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.data.formats import format_of
from tunesmith.data.labelstudio import judgements as of_label_studio
from tunesmith.data.opening import Row, unbroken
from tunesmith.data.section import SourceSection
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError, nearest


class Judgement(NamedTuple):
    """One person's label of one item."""

    item: str
    annotator: str
    label: str


def read_judgements(path: Path, item: str, annotator: str, label: str) -> list[Judgement]:
    """All judgements of a file; an empty label is none.

    Args:
        item, annotator, label: columns. Where one row holds several items, `{}` stands for their number: `q{}_uid`
            and `Answer.q{}` read q1_uid with Answer.q1, q2_uid with Answer.q2, and so on. Where a row holds a list of
            annotators and one of what each said, as JSON or as Python writes them, they go together in order; several
            labels of one person are one, joined by commas. Of a Label Studio export, `label` is the control's name
            (`from_name`), and the others are not needed.

    Raises:
        DataError: a column is in no row, no item was judged at all, or a row can't be read.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}", where="DATA", fix="Give the file that holds the labels.")
    if format_of(path) == "label_studio":
        every = list(of_label_studio(path))
        controls = sorted({control for _, _, control, _ in every})
        if label not in controls and len(controls) > 1:
            raise DataError(
                f"has several controls ({', '.join(controls)})", where=str(path), fix="Name one with --label."
            )
        wanted = label if label in controls else controls[0] if controls else ""
        found = [Judgement(item, who, said) for item, who, control, said in every if control == wanted]
    else:
        found = list(_of_table(path, item, annotator, label))
    if not found:
        raise DataError("holds no judgement", where=str(path), fix="Check the columns.")
    return found


def _of_table(path: Path, item: str, annotator: str, label: str) -> Iterator[Judgement]:
    seen: dict[str, None] = {}
    for number, row in unbroken(read_rows(SourceSection(path=str(path)), path), path):
        seen |= dict.fromkeys(row)
        for i, who, said in _columns(row, item, annotator, label):
            if all(row.get(column) not in (None, "") for column in (i, who, said)):
                people, labels = _listed(row[who]), _listed(row[said])
                if len(people) != len(labels):
                    raise DataError(
                        f"names {len(people)} annotators in '{who}' and {len(labels)} labels in '{said}'",
                        where=f"{path}:{number}",
                        fix="Mend the row, or take it out.",
                    )
                yield from (Judgement(str(row[i]), *pair) for pair in zip(people, labels, strict=True) if all(pair))
    for option, column in (("--item", item), ("--annotator", annotator), ("--label", label)):
        if column.replace("{}", "1") not in seen:
            raise DataError(
                f"has no column '{column}'{nearest(column, seen)} (its columns: {', '.join(seen)})",
                where=str(path),
                fix=f"Name it with {option}.",
            )


def _listed(value: Any) -> list[str]:
    """What a cell holds: one text, or each of a list's."""
    if isinstance(value, str) and value.startswith("["):
        for read in (json.loads, ast.literal_eval):  # neither runs anything
            try:
                value = read(value)
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    if not isinstance(value, list):
        return [str(value)]
    return [", ".join(map(str, one)) if isinstance(one, list) else str(one) for one in value]


def _columns(row: Row, item: str, annotator: str, label: str) -> Iterator[tuple[str, str, str]]:
    if "{}" not in item + label:
        yield item, annotator, label
        return
    for number in itertools.count(1):
        names = tuple(name.replace("{}", str(number)) for name in (item, annotator, label))
        if not (names[0] in row and names[2] in row):
            return
        yield names[0], names[1], names[2]
