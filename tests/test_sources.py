"""Sources: files of every format, the hub, URLs, databases, Label Studio; each row as it stands there."""

from __future__ import annotations

import gzip
import json
import shutil
import sqlite3
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import colour_rows, write_jsonl, write_recipe
from tests.fake_hub import COMMIT, FakeHub
from tunesmith.data import remote
from tunesmith.data.opening import Broken
from tunesmith.data.section import DataSection, SourceSection
from tunesmith.data.sources import read_rows, source_files
from tunesmith.errors import DataError, RecipeError, TunesmithError


def rows_of(folder: Path, **keys: Any) -> list[Any]:
    """The rows of one source: dicts as they are, broken ones by their reason."""
    files = source_files(DataSection(sources=[keys]), folder)["train"]
    found = [row for source, path in files for _, row in read_rows(source, path)]
    return [row.reason if isinstance(row, Broken) else row for row in found]


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
    (tmp_path / "a.jsonl.zst").write_bytes(pa.compress(text, codec="zstd", asbytes=True))
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


def pdf(text: str) -> bytes:
    """A one-page PDF that says a text, written by hand from the format's description."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]  # fmt: skip
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return out + b"xref\n0 5\n0000000000 65535 f \n" + table + trailer


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


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.data.opening.UNPACKED_AT_LEAST", 2**24)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(2**26)))
    with pytest.raises(DataError, match="unpacks to more than"):
        rows_of(tmp_path, path="a.txt.gz")


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


def test_mixed_types_and_layouts(prepared: Any, tmp_path: Path) -> None:
    rows: list[Any] = [
        {"prompt": "a", "completion": 1}, {"prompt": "b", "completion": "1"}, {"prompt": "c", "completion": [1]},
        {"prompt": 3, "completion": "x"}, {"question": "a", "answer": "b"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ]  # fmt: skip
    made = prepared(str(write_jsonl(tmp_path / "m.jsonl", rows)), max_rejected=1)
    assert made.counts["read"] == 6
    assert [t[1][1] for t in made.turns()][:3] == ["1", "1", "[1]"]


# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[dict[str, str]], FakeHub]]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = tmp_path / "set"
    folder.mkdir()
    with FakeHub({"team/set": folder, "team/gated": folder}, gated={"team/gated"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )

        def holds(files: dict[str, str]) -> FakeHub:
            shutil.rmtree(folder)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"hub{len(server.asked)}"))
            for name, text in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
            return server

        yield holds


CARD = """---
configs:
- config_name: small
  default: true
  data_files:
  - {split: train, path: "small/tr*.jsonl"}
  - {split: held, path: [small/held.jsonl]}
- config_name: big
  data_dir: big
  data_files: "*.csv"
---
# A set
"""


def row(name: str) -> str:
    return json.dumps({"name": name}) + "\n"


def test_hub_sets_by_their_card(hub: Any, tmp_path: Path) -> None:
    hub({"README.md": CARD, "small/tr1.jsonl": row("a"), "small/tr2.jsonl": row("b") + "{oh\n",
         "small/held.jsonl": row("c"), "big/x.csv": "name\nd\n"})  # fmt: skip
    assert rows_of(tmp_path, hub="team/set") == [{"name": "a"}, {"name": "b"}, "broken_json"]
    assert rows_of(tmp_path, hub="team/set", split="held", revision="main") == [{"name": "c"}]
    assert rows_of(tmp_path, hub="team/set", subset="big") == [{"name": "d"}]
    [(source, _), *_] = source_files(DataSection(sources=[{"hub": "team/set"}]), tmp_path)["train"]
    assert source.revision == COMMIT
    for keys, told in (
        ({"split": "test"}, "no split 'test'"), ({"subset": "bigg"}, "did you mean 'big'"),
        ({"revision": "v9"}, "no revision 'v9'"), ({"hub": "team/none"}, "not a data set of the hub"),
        ({"hub": "team/gated"}, "is gated"), ({"hub": "a/b/c"}, "not a hub id"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=told):
            rows_of(tmp_path, **({"hub": "team/set"} | keys))


def test_hub_sets_by_their_files(hub: Any, tmp_path: Path) -> None:
    hub({"data/train-00000-of-00002.jsonl": row("a"), "data/train-00001-of-00002.jsonl": row("b"),
         "data/test-00000.jsonl": row("c"), "retrained.csv": "x\n", "README.md": "# none"})  # fmt: skip
    assert rows_of(tmp_path, hub="team/set") == [{"name": "a"}, {"name": "b"}]
    assert rows_of(tmp_path, hub="team/set", split="test") == [{"name": "c"}]
    with pytest.raises(DataError, match="no split 'validation'"):
        rows_of(tmp_path, hub="team/set", split="validation")
    hub({"rows.jsonl": row("z")})
    assert rows_of(tmp_path, hub="team/set") == [{"name": "z"}]
    hub({"en/train.jsonl": row("e"), "de/train.jsonl": row("d")})
    assert rows_of(tmp_path, hub="team/set", subset="de") == [{"name": "d"}]
    with pytest.raises(DataError, match="several subsets"):
        rows_of(tmp_path, hub="team/set")
    hub({"set.py": "raise SystemExit"})
    with pytest.raises(DataError, match="never run"):
        rows_of(tmp_path, hub="team/set")


def test_the_manifest_pins_the_hubs_commit(hub: Any, prepared: Any) -> None:
    hub({"train.jsonl": "".join(json.dumps(r) + "\n" for r in colour_rows(30))})
    assert prepared({"hub": "team/set", "tag": "general"}).told["sources"] == [
        {"hub": "team/set", "split": "train", "revision": COMMIT, "tag": "general", "files": ["train.jsonl"]}
    ]


# ------------------------------------------------------------------ URLs


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))


class Web:
    """A server whose files break off midway so many times before they come whole."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.breaks, self.asked = 0, 0
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = web.files.get(self.path)
                if content is None:
                    self.send_error(404 if self.path != "/closed.jsonl" else 403)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", str(hash(content)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                web.asked += 1
                whole = web.breaks <= 0
                web.breaks -= 1
                self.wfile.write(content if whole else content[: len(content) // 2])
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def web(quick: None) -> Iterator[Web]:
    made = Web()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_url_is_tried_again_and_kept(web: Web, tmp_path: Path) -> None:
    content = (row("a") * 20_000).encode()
    web.files["/rows.jsonl"] = content
    web.breaks = 2
    url = f"{web.url}/rows.jsonl"
    assert len(rows_of(tmp_path, path=url)) == 20_000 and web.asked == 3
    assert len(rows_of(tmp_path, path=url)) == 20_000 and web.asked == 3  # the copy in the cache
    web.files["/rows.jsonl"] = row("b").encode()
    assert rows_of(tmp_path, path=url) == [{"name": "b"}] and web.asked == 4
    web.files["/rows.jsonl"] = content[:-9]
    web.breaks = 99
    with pytest.raises(DataError, match="could not be fetched, 3 tries"):
        rows_of(tmp_path, path=url)
    with pytest.raises(DataError, match="nothing is at"):
        rows_of(tmp_path, path=f"{web.url}/absent.jsonl")
    with pytest.raises(DataError, match="may not be read"):
        rows_of(tmp_path, path=f"{web.url}/closed.jsonl")
    with pytest.raises(DataError, match="no address"):
        rows_of(tmp_path, path="nosuch://x/y.jsonl")


def test_any_fsspec_url(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name in ("b", "a"):
        memory.pipe(f"/bucket/{name}.jsonl", row(name).encode())
    assert rows_of(tmp_path, path="memory://bucket/*.jsonl") == [{"name": "a"}, {"name": "b"}]
    with pytest.raises(DataError, match="nothing is at"):
        rows_of(tmp_path, path="memory://bucket/*.csv")
    with pytest.raises(DataError, match="is a folder"):
        rows_of(tmp_path, path="memory://bucket")
    assert remote.file_name("https://x/../..%2f/a b?.jsonl") == "a_b"
    assert remote.file_name("https://x/..") == "source"

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    memory.pipe("/bucket/a.jsonl", row("other").encode())
    monkeypatch.setattr(remote, "hash_file", full)
    with pytest.raises(TunesmithError, match="the disk is full"):
        rows_of(tmp_path, path="memory://bucket/a.jsonl")


def test_passwords_stay_out_of_recipes(recipe: Any) -> None:
    import tunesmith

    recipe["data"]["sources"] = [{"sql": "postgresql://me:secret@host/x", "query": "select 1"}]
    with pytest.raises(RecipeError, match="A_VARIABLE") as caught:
        tunesmith.check(recipe)
    assert "secret" not in str(caught.value)


# ------------------------------------------------------------------ databases


def test_databases(tmp_path: Path, prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with sqlite3.connect(tmp_path / "t.db") as base:
        base.execute("create table tickets (prompt text, completion text, at date, raw blob, n real)")
        base.executemany(
            "insert into tickets values (?, ?, ?, ?, ?)",
            [("a", "b", "2024-05-06", b"\xff\x00", 1.5), ("c é", "d", None, b"ok", 9e999)],
        )
    base.close()
    keys = {"sql": "sqlite:///t.db", "query": "select prompt, completion from tickets order by prompt"}
    assert rows_of(tmp_path, **keys) == [{"prompt": "a", "completion": "b"}, {"prompt": "c é", "completion": "d"}]
    made = prepared(keys | {"tag": "mine"})
    assert made.turns() == [[("user", "a"), ("assistant", "b")], [("user", "c é"), ("assistant", "d")]]
    assert made.told["sources"] == [{"query": keys["query"], "tag": "mine", "files": ["query.jsonl"]}]
    blobs = rows_of(tmp_path, sql=keys["sql"], query="select raw from tickets order by prompt")
    assert blobs == [{"raw": "ff00"}, {"raw": "ok"}]
    assert rows_of(tmp_path, sql=keys["sql"], query="select n from tickets order by prompt") == [
        {"n": 1.5},
        "broken_json",
    ]
    monkeypatch.setenv("TUNESMITH_TEST_DB", "t.db")
    for wrong, told in (
        ({"query": "select absent from tickets"}, "refuses the query .*no such column"),
        ({"query": "delete from tickets"}, "gives no rows"),
        ({"query": "select prompt, prompt from tickets"}, "two columns named 'prompt'"),
        ({"sql": "sqlite:///absent.db"}, "no such database"),
        ({"sql": "tickets.db"}, "no database's URL"),
        ({"sql": "oracle9://x/y"}, "no database's URL"),
    ):
        with pytest.raises(DataError, match=told):
            rows_of(tmp_path, **(keys | wrong))
    assert len(rows_of(tmp_path, sql="sqlite:///$TUNESMITH_TEST_DB", query=keys["query"])) == 2  # nothing was deleted


# ------------------------------------------------------------------ Label Studio


def task(number: int, text: str, *labels: str, **more: Any) -> dict[str, Any]:
    said = [
        {"completed_by": who, "result": [
            {"from_name": "sentiment", "to_name": "text", "type": "choices", "value": {"choices": [label]}}]}
        for who, label in enumerate(labels)
    ]  # fmt: skip
    return {"id": number, "data": {"text": text}, "annotations": said} | more


def test_label_studio_exports(tmp_path: Path, prepared: Any) -> None:
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
    made = prepared(keys, max_rejected=1)
    assert made.turns() == [[("user", "a"), ("assistant", "good")], [("user", "b"), ("assistant", "bad")]]
    assert [r["reason"] for r in made.rejected] == ["annotators_disagree", "not_annotated", "lacks_field"]
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
    ],
)
def test_sources_that_cannot_be_meant(recipe: Any, keys: Any, told: str, tunesmith: Any, tmp_path: Path) -> None:
    recipe["data"]["sources"] = [keys]
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 2 and told in said.json["error"]["what"]
