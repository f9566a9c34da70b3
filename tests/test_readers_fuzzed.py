"""Whatever a file holds: each of its rows is accepted or rejected with a reason, or the file refused in a sentence."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sources import pdf, task
from tests.test_data import CSV, JSONL, mutated
from tunesmith.data.opening import Broken
from tunesmith.data.section import SourceSection
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError

ANY = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _arrow(stream: bool) -> bytes:
    import pyarrow as pa

    table = pa.table({"prompt": ["a", "é", None], "n": [1, 2, 3], "list": [["x"], [], ["y", "z"]]})
    out = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _parquet() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a", "é", None], "completion": [[{"x": 1}], [], None]}), out)
    return out.getvalue()


def _docx() -> bytes:
    import docx

    page, out = docx.Document(), io.BytesIO()
    page.add_paragraph("Text")
    page.save(out)
    return out.getvalue()


TEXT = "One\ntwo é\n\n three\r\n".encode()
SEEDS: dict[str, bytes] = {
    "jsonl": JSONL, "csv": CSV, "tsv": CSV.replace(b",", b"\t"), "txt": TEXT, "md": TEXT, "conll": b"a B\nb O\n\nc O\n",
    "html": b"<h1>A</h1><p>b<ul><li>c</ul><table><tr><td>d</table>", "jsonl.gz": gzip.compress(JSONL),
    "label_studio": json.dumps([task(1, "a", "x", "y"), task(2, "b", "x")]).encode(),
}  # fmt: skip
MADE = {"parquet": _parquet, "s.arrow": lambda: _arrow(True), "f.arrow": lambda: _arrow(False), "docx": _docx,
        "pdf": lambda: pdf("Text")}  # fmt: skip


def read(path: Path, form: str = "auto") -> tuple[list[Any] | None, list[str]]:
    """The rows, or None where the file is refused as a whole; and what is wrong with what was read or told: a refusal
    says what, where and what to do, each row has a number and is data or broken for a reason, and all of it can be
    written as UTF-8 (raises where it can't)."""
    try:
        rows = list(read_rows(SourceSection(path=path.name, format=form), path))
    except DataError as error:
        parts = {"a sentence": str(error).encode(), "where": error.where, "fix": error.fix}
        return None, [f"refused without {name}: {error!r}" for name, part in parts.items() if not part]
    return rows, [flaw for number, row in rows for flaw in flaws(number, row)]


def flaws(number: int, row: Any) -> list[str]:
    """What is wrong with a row as it was read."""
    found = [f"number {number}"] if number < 1 else []
    if isinstance(row, Broken):
        row.text.encode()
        return found if row.reason and row.why else [*found, f"row {number} is broken for no reason"]
    json.dumps(row, ensure_ascii=False, default=str).encode()
    return found


@pytest.mark.parametrize("form", SEEDS)
@ANY
@given(data=st.data())
def test_mutated_files(tmp_path: Path, form: str, data: Any) -> None:
    path = tmp_path / ("m.json" if form == "label_studio" else f"m.{form}")
    path.write_bytes(mutated(data, SEEDS[form]))
    _, wrong = read(path, form if form == "label_studio" else "auto")
    assert wrong == []


@pytest.mark.parametrize("form", MADE)
@settings(parent=ANY, max_examples=40)
@given(data=st.data())
def test_mutated_binaries(tmp_path: Path, form: str, data: Any) -> None:
    path = tmp_path / f"m.{form}"
    path.write_bytes(mutated(data, MADE[form]()))
    _, wrong = read(path)
    assert wrong == []


@ANY
@given(content=st.binary(max_size=300))
def test_any_bytes_of_no_known_ending(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    _, wrong = read(path)
    assert wrong == []


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=8)


@ANY
@given(
    rows=st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8),
    stray=st.integers(0, 7),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    bom=st.booleans(),
)
def test_a_stray_quote_loses_no_other_row(tmp_path: Path, rows: Any, stray: int, ends: str, bom: bool) -> None:
    """Cells without quotes or line ends, one line opened by a stray quote: every other line is a row."""
    clean = [tuple("".join(c for c in cell if c not in '",\r\n') + "x" for cell in row) for row in rows]
    lines = [",".join(row) for row in clean]
    stray = min(stray, len(lines) - 1)
    lines[stray] = '"' + lines[stray]
    (tmp_path / "q.csv").write_bytes((("\ufeff" if bom else "") + ends.join(["a,b", *lines]) + ends).encode())
    found, wrong = read(tmp_path / "q.csv")
    assert wrong == [] and found is not None and len(found) == len(lines)
    for i, (number, row) in enumerate(found):
        assert number == i + 2
        assert row == {"a": clean[i][0], "b": clean[i][1]} if i != stray else row.reason == "broken_csv"


VALUE = st.integers() | CELL | st.none() | st.lists(CELL)


@ANY
@given(rows=st.lists(st.dictionaries(st.sampled_from("abc"), VALUE), max_size=6),
       ends=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]), cut=st.integers(0, 400))  # fmt: skip
def test_a_file_cut_short_loses_no_row_before_the_cut(tmp_path: Path, rows: Any, ends: str, cut: int) -> None:
    whole = "".join(json.dumps(row) + ends for row in rows)
    (tmp_path / "c.jsonl").write_bytes(whole[:cut].encode())
    found, wrong = read(tmp_path / "c.jsonl")
    assert wrong == [] and found is not None
    good = [row for _, row in found if not isinstance(row, Broken)]
    assert good == rows[: len(good)] and len(found) - len(good) <= 1
    if cut >= len(whole):
        assert good == rows
