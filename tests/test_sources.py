"""Sources that are files, of every format, Label Studio's too: each row as it stands there."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import colour_rows, write_jsonl, write_recipe
from tests.sources import pdf, rows_of, task
from tunesmith.data import formats, readers
from tunesmith.data.opening import Broken
from tunesmith.data.section import DataSection, SourceSection
from tunesmith.data.sources import read_rows, source_files
from tunesmith.errors import DataError, TunesmithError
from tunesmith.runs import read_jsonl

# ------------------------------------------------------------------ formats


def test_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo  \rthree\n\xff\n")
    assert rows_of(tmp_path, path="a.txt") == [{"text": "one"}, {"text": "two  "}, {"text": "three"}, "not_utf8"]
    (tmp_path / "b.txt").write_text("a\nb\n\n\nc\n")
    assert rows_of(tmp_path, path="b.txt", format="paragraphs") == [{"text": "a\nb"}, {"text": "c"}]
    assert rows_of(tmp_path, path="b.txt", format="document") == [{"text": "a\nb\n\n\nc"}]
    (tmp_path / "c.md").write_text("# Title\n\nText\n")
    assert rows_of(tmp_path, path="c.md") == [{"text": "# Title\n\nText"}]
    (tmp_path / "notes").write_text("no ending\n")
    (tmp_path / "rows.dump").write_text('\n{"a": 1}\n')
    assert rows_of(tmp_path, path="notes") == [{"text": "no ending"}]
    assert rows_of(tmp_path, path="rows.dump") == [{"a": 1}]
    (tmp_path / "d.conll").write_text("-DOCSTART- O\n\nAnn B-PER\nsaid O\n\nYes O\n")
    assert rows_of(tmp_path, path="d.conll") == [
        {"text": "Ann said", "tokens": ["Ann", "said"], "tags": ["B-PER", "O"]},
        {"text": "Yes", "tokens": ["Yes"], "tags": ["O"]},
    ]
    (tmp_path / "w.csv").write_text("a,b\né,2\n", encoding="utf-16")
    assert rows_of(tmp_path, path="w.csv") == [{"a": "é", "b": "2"}]
    (tmp_path / "list.json").write_text('["x", "y"]')
    assert rows_of(tmp_path, path="list.json") == [{"text": "x"}, {"text": "y"}]


def test_packed_and_columnar(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = [{"a": i, "b": "é" * i} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(packed(text, "zst"))
    assert rows_of(tmp_path, path="a.jsonl.zst") == rows
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as file:
        file.write_table(table)
    with pa.OSFile(str(tmp_path / "s.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as stream:
        stream.write_table(table)
    for name in ("f.arrow", "s.arrow"):
        assert rows_of(tmp_path, path=name) == rows
    damaged = bytearray((tmp_path / "f.arrow").read_bytes())
    for start in range(0, len(damaged), 61):
        (tmp_path / "d.arrow").write_bytes(damaged[:start] + bytes(30) + damaged[start + 30 :])
        try:
            rows_of(tmp_path, path="d.arrow")
        except DataError as error:
            assert "d.arrow" in str(error)


def test_html(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<html><head><title>no</title></head><body><h1>Cards</h1><script>x()</script><p>Ask <b>us</b>.</p>"
        "<ul><li>one<li>two</ul></body>"
    )
    [row] = rows_of(tmp_path, path="a.html")
    assert row["text"].startswith("# Cards\n\nAsk **us**.") and "x()" not in row["text"] and "one" in row["text"]


def test_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import docx

    (tmp_path / "a.pdf").write_bytes(pdf("Terms of the card"))
    (tmp_path / "scan.pdf").write_bytes(pdf(""))
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 nothing")
    assert rows_of(tmp_path, path="a.pdf") == [{"text": "Terms of the card"}]
    assert rows_of(tmp_path, path="*.pdf") == [{"text": "Terms of the card"}, "broken_document", "no_text"]
    page = docx.Document()
    page.add_heading("Terms", 1)
    page.add_paragraph("First.")
    page.add_paragraph("point", style="List Bullet")
    table = page.add_table(1, 2)
    table.cell(0, 0).text, table.cell(0, 1).text = "a", "b"
    page.save(str(tmp_path / "a.docx"))
    assert rows_of(tmp_path, path="a.docx") == [{"text": "# Terms\n\nFirst.\n\n- point\n\na | b"}]
    (tmp_path / "b.docx").write_bytes((tmp_path / "a.docx").read_bytes()[:900])
    assert rows_of(tmp_path, path="b.docx") == ["broken_document"]
    with (
        zipfile.ZipFile(tmp_path / "bomb.docx", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("word/document.xml", "w", force_zip64=True) as part,
    ):
        for _ in range(600):
            part.write(bytes(2**20))
    with pytest.raises(DataError, match="unpacks to more than 512 MiB"):
        rows_of(tmp_path, path="bomb.docx")
    monkeypatch.setitem(__import__("sys").modules, "docx", None)
    with pytest.raises(TunesmithError, match=r"tunesmith\[documents\]"):
        rows_of(tmp_path, path="a.docx")


def packed(content: bytes, ending: str) -> bytes:
    import pyarrow as pa

    whole: bytes = gzip.compress(content) if ending == "gz" else pa.compress(content, codec="zstd", asbytes=True)
    return whole


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr("tunesmith.data.opening.UNPACKED_AT_LEAST", 2**24)
    (tmp_path / f"a.txt.{ending}").write_bytes(packed(bytes(2**26), ending))
    with pytest.raises(DataError, match="unpacks to more than"):
        rows_of(tmp_path, path=f"a.txt.{ending}")


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_packed_file_cut_short(tmp_path: Path, ending: str) -> None:
    """Wherever it is cut, no row is taken for the last."""
    whole = packed("".join(json.dumps({"n": i, "x": i * 7919 % 1009}) + "\n" for i in range(300)).encode(), ending)
    for end in range(1, len(whole), 97):
        (tmp_path / f"a.jsonl.{ending}").write_bytes(whole[:end])
        with pytest.raises(DataError, match="can't be unpacked") as refused:
            rows_of(tmp_path, path=f"a.jsonl.{ending}")
        assert "cut short" in str(refused.value.fix)


@pytest.mark.parametrize("name", ["m.pkl", "m.pt", "a.zip", "a.tar.gz", "a.tar"])
def test_what_is_never_opened(tmp_path: Path, name: str) -> None:
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match=r"never read|not unpacked"):
        rows_of(tmp_path, path=name)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", colour_rows())
    rows = read_rows(SourceSection(path="a.jsonl"), path)
    next(rows)
    with path.open("a") as more:
        more.write("{}\n")
    with pytest.raises(DataError, match="changed while it was read"):
        list(rows)


# ------------------------------------------------------------------ rows that are not rows


def test_json_that_loses_nothing(tmp_path: Path) -> None:
    bad = {
        '{"a": 1, "a": 2}': "duplicate_key", '{"a": {"b": 1, "c": 2, "b": 3}}': "duplicate_key",
        '{"a": NaN}': "broken_json",
        '{"a": -Infinity}': "broken_json", '{"a": 1e999}': "broken_json", '{"a": "\\ud83d"}': "half_character",
        "[1]": "not_an_object", '{"a": ' + "[" * 20_000: "broken_json", '{"a": ' + "9" * 5000 + "}": "broken_json",
    }  # fmt: skip
    good = '{"a": 1}'
    (tmp_path / "a.jsonl").write_text("".join(f"{good}\n{line}\n" for line in bad))
    expected = [x for reason in bad.values() for x in ({"a": 1}, reason)]
    assert rows_of(tmp_path, path="a.jsonl") == expected
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": {"b": 1, "b": 2}}, 3]')
    assert rows_of(tmp_path, path="a.json") == [{"a": 1}, "duplicate_key", "not_an_object"]


def test_a_line_of_fifty_megabytes(tmp_path: Path) -> None:
    import resource

    with (tmp_path / "a.jsonl").open("w") as out:
        for text in ("x", "y" * 50_000_000, "z"):
            out.write(json.dumps({"a": text}) + "\r\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    files = source_files(DataSection(sources=["a.jsonl"]), tmp_path)["train"]
    rows = list(read_rows(*files[0]))
    assert [n for n, _ in rows] == [1, 2, 3] and rows[0][1] == {"a": "x"} and rows[2][1] == {"a": "z"}
    broken = rows[1][1]
    assert isinstance(broken, Broken) and broken.reason == "too_long" and len(broken.text) < 3000
    assert "50,000,0" in broken.why
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # KiB


def test_one_stray_quote_costs_one_row(tmp_path: Path) -> None:
    lines = [f"p{i},c{i}" for i in range(50)]
    lines[7] = '"p7,c7'
    lines[20] = '"two\nlines",c20'
    lines[30] = '"p30" x,c30'
    lines[40] = "=1+1,@SUM(A1)"  # a spreadsheet's formula is text here
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "\n".join(lines) + "\n")
    rows = rows_of(tmp_path, path="a.csv")
    assert len(rows) == 50 and [i for i, row in enumerate(rows) if row == "broken_csv"] == [7, 30]
    assert rows[20] == {"prompt": "two\nlines", "completion": "c20"}
    assert rows[40] == {"prompt": "=1+1", "completion": "@SUM(A1)"}
    numbers = [n for n, _ in read_rows(SourceSection(path="a.csv"), tmp_path / "a.csv")]
    assert numbers == [i + 2 + (i > 20) for i in range(50)]


def test_semicolons(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('\ufeffprompt;completion\r\n"a;b";c, d\r\n\r\ne;f;g\r\n')
    assert rows_of(tmp_path, path="a.csv") == [{"prompt": "a;b", "completion": "c, d"}, "broken_csv"]
    (tmp_path / "a.csv").write_text("prompt,a;b\nx,y;z\n")
    assert rows_of(tmp_path, path="a.csv") == [{"prompt": "x", "a;b": "y;z"}]


def test_mixed_types_and_layouts(prepared: Any, tmp_path: Path) -> None:
    rows: list[Any] = [
        {"prompt": "a", "completion": 1}, {"prompt": "b", "completion": "1"}, {"prompt": "c", "completion": [1]},
        {"prompt": 3, "completion": "x"}, {"question": "a", "answer": "b"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]  # fmt: skip
    made = prepared(str(write_jsonl(tmp_path / "m.jsonl", rows)), max_rejected=1)
    assert made.counts["read"] == 6
    assert made.turns() == [
        [("user", asked), ("assistant", said)] for asked, said in [("a", "1"), ("b", "1"), ("c", "[1]"), ("3", "x")]
    ]
    assert [(r["row"], r["reason"], r["why"]) for r in made.rejected] == [
        ("m.jsonl:5", "lacks_field", "lacks 'prompt' (it has: question, answer)"),
        ("m.jsonl:6", "lacks_field", "lacks 'prompt' (it has: messages)"),
    ]


def test_columns_of_a_table_are_kept_as_json_has_them(prepared: Any, tmp_path: Path) -> None:
    """Dates, decimals, bytes and numbers that are none; as the text, as what a split looks at, and as kept columns."""
    import datetime
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    nan, inf = float("nan"), float("inf")
    table = pa.table(
        {
            "prompt": list("abcdef"),
            "completion": pa.array([1.5, nan, 2.0, inf, -0.25, 1e22], pa.float64()),
            "day": [datetime.date(2026, 1, 1 + i // 2) for i in range(6)],
            "at": pa.array([datetime.datetime(2026, 1, 1, 8, i) for i in range(6)], pa.timestamp("us", "UTC")),
            "price": pa.array([decimal.Decimal(f"{i}.00000000") for i in range(6)], pa.decimal128(12, 8)),
            "key": pa.array([bytes([i, 255]) for i in range(6)], pa.binary()),
            "rate": pa.array([nan, inf, None, 0.5, -inf, 2.0], pa.float64()),
            "inner": [{"x": nan, "on": [datetime.date(2026, 1, 1)]}] * 6,
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as file:
        file.write_table(table)
    keep = ["day", "at", "price", "key", "rate", "inner"]
    for name in ("t.parquet", "t.arrow"):
        made = prepared({"path": name, "keep": keep}, max_rejected=1)
        assert [row.answer for row in made.parts["train"]] == ["1.5", "2.0", "-0.25", "1e+22"]
        assert [(r["row"], r["reason"]) for r in made.rejected] == [(f"{name}:{n}", "lacks_field") for n in (2, 4)]
        first, *_, last = (row.metadata for row in made.parts["train"])
        assert first == {
            "day": "2026-01-01", "at": "2026-01-01T08:00:00+00:00", "price": "0.00000000", "key": "AP8=",
            "inner": {"x": None, "on": ["2026-01-01"]},
        }  # fmt: skip
        assert last["rate"] == 2.0
        for part in (tmp_path / "out").glob("*.jsonl"):
            for line in part.read_text().splitlines():
                json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
        for column in keep[:-1]:
            split = {"validation": 0, "test": 2, "by": column, "stratify": column}
            assert prepared(name, max_rejected=1, split=split).counts["test"] == 2
        newest = prepared(name, max_rejected=1, split={"validation": 0, "test": 1, "time": "at"})
        assert [row.question for row in newest.parts["test"]] == ["f"]
        found = prepared({"path": name, "where": {"price": [2, 4.0]}}, max_rejected=1)
        assert [row.question for row in found.parts["train"]] == ["c", "e"]
    with pytest.raises(DataError, match=r"t\.parquet:1: 'key' holds bytes, not text"):
        prepared({"path": "t.parquet", "columns": {"prompt": "key", "completion": "day"}}, max_rejected=1)


def test_held_out_files_are_read_as_the_sources_are(prepared: Any, tmp_path: Path) -> None:
    """With the columns that are kept, the format of files of that ending, and the tag where there is one."""
    for name in ("a", "b", "t"):
        lines = [f"{name} {i}\tyes\tteam{i % 2}" for i in range(4)]
        (tmp_path / f"{name}.data").write_text("\n".join(["prompt\tcompletion\tteam", *lines]))
    (tmp_path / "v.csv").write_text("prompt,completion,team\nv,no,team1\n")
    like = {"format": "tsv", "keep": ["team"]}
    split = {"validation": "v.csv", "test": "t.data"}
    made = prepared({"path": "a.data", "tag": "mine", **like}, {"path": "b.data", "tag": "mine", **like}, split=split)
    assert [row.metadata for row in made.parts["test"]] == [{"tag": "mine", "team": f"team{i % 2}"} for i in range(4)]
    assert [row.metadata for row in made.parts["validation"]] == [{"tag": "mine", "team": "team1"}]
    made = prepared({"path": "a.data", "tag": "mine", **like}, {"path": "b.data", "tag": "other", **like}, split=split)
    assert [row.metadata for row in made.parts["validation"]] == [{"team": "team1"}]


# ------------------------------------------------------------------ Label Studio


def test_label_studio_exports(tmp_path: Path, prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    skipped = task(4, "d", "good")
    skipped["annotations"][0]["was_cancelled"] = True
    spans = task(5, "Ann went", "x")
    spans["annotations"][0]["result"] = [
        {"from_name": "ner", "type": "labels", "value": {"start": 0, "end": 3, "text": "Ann", "labels": ["PER"]}}
    ]
    tasks = [task(1, "a", "good"), task(2, "b", "bad", "good", "bad"), task(3, "c", "good", "bad"), skipped, spans]
    (tmp_path / "export.json").write_text(json.dumps(tasks))
    assert rows_of(tmp_path, path="export.json") == [
        {"text": "a", "sentiment": "good"}, {"text": "b", "sentiment": "bad"}, "annotators_disagree", "not_annotated",
        {"text": "Ann went", "ner": '[{"start":0,"end":3,"text":"Ann","labels":["PER"]}]'},
    ]  # fmt: skip
    keys = {"path": "export.json", "columns": {"prompt": "text", "completion": "sentiment"}}
    parsed: list[int] = []
    load = readers.load_json
    monkeypatch.setattr(readers, "load_json", lambda text: parsed.append(len(text)) or load(text))
    formats._has_task.cache_clear()
    made = prepared(keys, max_rejected=1)
    assert len(parsed) == 3  # to know it for what it is, for its columns, for its rows
    assert made.turns() == [[("user", "a"), ("assistant", "good")], [("user", "b"), ("assistant", "bad")]]
    assert [r["reason"] for r in made.rejected] == ["annotators_disagree", "not_annotated", "lacks_field"]
    (tmp_path / "export.json").write_text(json.dumps([task(1, "HALF", "good"), tasks[0]]).replace("HALF", "\\uD83D"))
    assert rows_of(tmp_path, path="export.json") == ["half_character", {"text": "a", "sentiment": "good"}]
    (tmp_path / "other.json").write_text('[{"a": 1}]')
    with pytest.raises(DataError, match="no Label Studio export"):
        rows_of(tmp_path, path="other.json", format="label_studio")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "one of `path`, `hub` and `sql`"),
        ({"path": "a", "hub": "b/c"}, "one of `path`, `hub` and `sql`"),
        ({"sql": "sqlite:///x"}, "`sql` and `query` go together"),
        ({"path": "a", "revision": "main"}, "belong to a `hub`"),
        ({"path": "a", "format": "jsonll"}, "did you mean 'jsonl'"),
        ({"path": "a", "weight": 0}, "greater than 0"),
        ({"path": "a", "keep": ["team", "tag"]}, "rows have a 'tag' of their own"),
    ],
)
def test_sources_that_cannot_be_meant(recipe: Any, keys: Any, told: str, tunesmith: Any, tmp_path: Path) -> None:
    recipe["data"]["sources"] = [keys]
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 2 and told in said.json["error"]["what"]


def test_rows_of_files_of_one_name_are_told_apart(tmp_path: Path, recipe: dict[str, Any]) -> None:
    """Where they are kept, refused, removed and listed."""
    import tunesmith as ts

    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "rows.jsonl", [*colour_rows(12), {"prompt": "", "completion": ""}])
    write_jsonl(tmp_path / "more.jsonl", [{"prompt": f"More {i}?", "completion": "red"} for i in range(8)])
    sources = [{"path": str(tmp_path / "*/rows.jsonl")}, {"path": str(tmp_path / "more.jsonl")}]
    recipe["data"] |= {"sources": sources, "max_rejected": 0.5, "clean": {"duplicates": "exact"}}
    run = ts.run(write_recipe(tmp_path, recipe), (), tmp_path / "runs", ("data",)).run
    found = {name: read_jsonl(run.stage("data") / f"{name}.jsonl") for name in ("rejected", "removed", "train")}
    assert sorted(row["row"] for row in found["rejected"]) == ["a/rows.jsonl:13", "b/rows.jsonl:13"]
    assert {row["row"].partition(":")[0] for row in found["removed"]} == {"b/rows.jsonl"}
    assert all("says the same as a/rows.jsonl:" in row["why"] for row in found["removed"])
    assert {row["id"].partition(":")[0] for row in found["train"]} == {"a/rows.jsonl", "more.jsonl"}
    told = run.manifest("data")
    assert told and [s["files"] for s in told["sources"]] == [["a/rows.jsonl", "b/rows.jsonl"], ["more.jsonl"]]
