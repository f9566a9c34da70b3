"""Sources from elsewhere: the hub, URLs, databases; each row as it stands there."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from tests.conftest import colour_rows
from tests.fake_hub import COMMIT, FakeHub, hub_of
from tests.listening import Listening, Quiet
from tests.sources import rows_of
from tunesmith.data import remote
from tunesmith.data.section import DataSection
from tunesmith.data.sources import source_files
from tunesmith.errors import DataError, RecipeError, TunesmithError

# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[dict[str, str]], FakeHub]]:
    from huggingface_hub import constants

    folder = tmp_path / "set"
    folder.mkdir()
    sets = {"team/set": folder, "team/gated": folder}
    with hub_of(monkeypatch, tmp_path, sets, gated=["team/gated"]) as server:

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
- config_name: deep
  data_files: "small/**/*.jsonl"
---
# A set
"""


def row(name: str) -> str:
    return json.dumps({"name": name}) + "\n"


def test_hub_sets_by_their_card(hub: Any, tmp_path: Path) -> None:
    hub({"README.md": CARD, "small/tr1.jsonl": row("a"), "small/tr2.jsonl": row("b") + "{oh\n",
         "small/held.jsonl": row("c"), "big/x.csv": "name\nd\n", "small/tr/old.jsonl": row("o"), "big/old/x.csv": "x\n",
         "small/.tr.jsonl": row("h")})  # fmt: skip
    assert rows_of(tmp_path, hub="team/set") == [{"name": "a"}, {"name": "b"}, "broken_json"]
    assert rows_of(tmp_path, hub="team/set", split="held", revision="main") == [{"name": "c"}]
    assert rows_of(tmp_path, hub="team/set", subset="big") == [{"name": "d"}]
    deep = rows_of(tmp_path, hub="team/set", subset="deep")
    assert deep == [{"name": "c"}, {"name": "o"}, {"name": "a"}, {"name": "b"}, "broken_json"]
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


@pytest.mark.parametrize("name", ["../train.jsonl", "data/../../train.jsonl", "/etc/train.jsonl", "..\\train.jsonl"])
def test_a_set_that_names_a_file_outside_of_itself(hub: Any, tmp_path: Path, name: str) -> None:
    server = hub({"train.jsonl": row("a")})
    server.also.append(name)
    with pytest.raises(DataError, match="names a file outside of itself") as refused:
        rows_of(tmp_path, hub="team/set")
    assert name in str(refused.value) and not [asked for asked in server.asked if "/resolve/" in asked]


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

        class Handler(Quiet):
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

        self.server = Listening(Handler)
        self.url = self.server.url


@pytest.fixture
def web(quick: None) -> Iterator[Web]:
    made = Web()
    yield made
    made.server.close()


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


class Bucket(Web):
    """A bucket as S3 has it, of `files` under their paths; names are not told, nor files given, without a signature."""

    def __init__(self) -> None:
        super().__init__()
        bucket = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                content = bucket.files.get(path)
                signed = "AWS4-HMAC-SHA256 Credential=someone/" in self.headers.get("Authorization", "")
                status, headers = (200 if signed else 403), {}
                if "list-type=2" in query:
                    start = f"{path.rstrip('/')}/"
                    found = [name for name in sorted(bucket.files) if name.startswith(start + asked(query, "prefix"))]
                    told = "".join(
                        f"<Contents><Key>{name.removeprefix(start)}</Key><Size>{len(bucket.files[name])}</Size>"
                        f'<ETag>"{abs(hash(bucket.files[name])):x}"</ETag><StorageClass>STANDARD</StorageClass>'
                        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>" for name in found
                    )  # fmt: skip
                    content = (
                        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false'
                        f"</IsTruncated><KeyCount>{len(found)}</KeyCount>{told}</ListBucketResult>"
                    ).encode()
                elif content is None:
                    status = 404 if signed else 403
                else:
                    headers = {"ETag": f'"{abs(hash(content)):x}"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
                    if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                        content, status = content[int(span[1]) : int(span[2] or len(content)) + 1], 206
                content = content if status < 300 and content is not None else b""
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(content))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    bucket.asked += "list-type" not in query
                    self.wfile.write(content)

            do_HEAD = do_GET

        def asked(query: str, name: str) -> str:
            return parse_qs(query).get(name, [""])[0]

        self.server.close()
        self.server = Listening(Handler)
        self.url = self.server.url


def test_a_bucket_of_s3(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By s3fs and botocore themselves, against a server that speaks S3's protocol."""
    pytest.importorskip("s3fs")
    bucket = Bucket()
    bucket.files = {f"/team/rows/{name}.jsonl": (row(name) * 3).encode() for name in ("b", "a")}
    bucket.files["/team/rows/a.csv"] = b"name\nc\n"
    try:
        for name, value in {"ENDPOINT_URL": bucket.url, "ACCESS_KEY_ID": "someone", "SECRET_ACCESS_KEY": "secret",
                            "DEFAULT_REGION": "eu-central-1", "EC2_METADATA_DISABLED": "true",
                            "MAX_ATTEMPTS": "1"}.items():  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        both = [{"name": name} for name in "aaabbb"]
        assert rows_of(tmp_path, path="s3://team/rows/*.jsonl") == both and bucket.asked == 2
        assert rows_of(tmp_path, path="s3://team/rows/*.jsonl") == both and bucket.asked == 2  # kept by their ETag
        bucket.files["/team/rows/a.jsonl"] = row("d").encode()
        assert rows_of(tmp_path, path="s3://team/rows/*.jsonl") == [{"name": name} for name in "dbbb"]
        assert rows_of(tmp_path, path="s3://team/rows/a.csv") == [{"name": "c"}]
        with pytest.raises(DataError, match=r"nothing is at s3://team/rows/x\.jsonl"):
            rows_of(tmp_path, path="s3://team/rows/x.jsonl")
    finally:
        bucket.server.close()


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


def test_a_database_server(tmp_path: Path, prepared: Any, postgres: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL's own types, a password from the environment, many rows through a cursor, and what it refuses."""
    sa = pytest.importorskip("sqlalchemy")
    address = postgres.database().replace("postgresql://tunesmith@", "postgresql+psycopg://tunesmith:${DB_PASSWORD}@")
    monkeypatch.setenv("DB_PASSWORD", "any")  # this server asks for none
    engine = sa.create_engine(address.replace("${DB_PASSWORD}", "any"))
    with engine.begin() as base:
        base.execute(sa.text(
            "create table t (id int, prompt text, completion text, at timestamptz, sum numeric, more jsonb, raw bytea, "
            "ok boolean, many text[])"
        ))  # fmt: skip
        base.execute(sa.text(
            "insert into t select i, 'Question ' || i || ' é?', 'a' || i % 7, '2026-11-22 08:00:00+00', 1.50, "
            "'{\"a\": [1]}', '\\xff00', i % 2 = 0, array['x', 'y'] from generate_series(1, 2500) i"
        ))  # fmt: skip
    query = "select prompt, completion from t order by id"
    made = prepared({"sql": address, "query": query})
    assert made.counts["train"] == 2500 and made.turns()[1] == [("user", "Question 2 é?"), ("assistant", "a2")]
    assert "any" not in json.dumps(made.told["sources"])
    [row] = rows_of(tmp_path, sql=address, query="select at, sum, more, raw, ok, many from t where id = 2")
    assert row == {"at": row["at"], "sum": "1.50", "more": {"a": [1]}, "raw": "ff00", "ok": True, "many": ["x", "y"]}
    assert datetime.datetime.fromisoformat(row["at"]).timestamp() == 1795334400
    for wrong, told in (
        ({"query": "select absent from t"}, 'refuses the query .*column "absent" does not exist'),
        ({"query": "delete from t returning prompt"}, "refuses the query"),  # read by a cursor, which can't
        ({"sql": address.replace("/test", "/none")}, "refuses the query .*does not exist"),
    ):
        with pytest.raises(DataError, match=told) as caught:
            rows_of(tmp_path, **({"sql": address, "query": query} | wrong))
        assert ":any@" not in str(caught.value)
    with engine.connect() as base:
        assert base.execute(sa.text("select count(*) from t")).scalar() == 2500
    engine.dispose()
