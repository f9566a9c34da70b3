"""Files and uploads of the service, by OpenAI's own client."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from tests import service
from tests.service import Running, chat, jsonl, openai, pairs, refused, wait
from tunesmith.api import uploads
from tunesmith.store import tables

api, client = service.api, service.client


def test_a_file_comes_and_goes(api: Running, client: Any) -> None:
    content = jsonl(chat(12))
    made = client.files.create(
        file=("../../etc/rows.jsonl", content),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (made.object, made.bytes, made.status, made.filename) == ("file", len(content), "processed", "rows.jsonl")
    assert made.expires_at == made.created_at + 3600
    assert client.files.retrieve(made.id).id == made.id
    assert client.files.content(made.id).content == content
    assert client.files.wait_for_processing(made.id).id == made.id
    kept = api.service.artifacts.path(f"files/{made.id}")
    assert kept.read_bytes() == content
    gone = client.files.delete(made.id)
    assert gone.deleted and not kept.exists()
    refused(lambda: client.files.retrieve(made.id), openai.NotFoundError)
    refused(lambda: client.files.content(made.id), openai.NotFoundError)


def test_files_are_listed_in_pages(api: Running) -> None:
    client = api.client(project=api.service.store.keys.create_project("paged").id)
    made = [client.files.create(file=b"x", purpose="user_data").id for _ in range(5)]
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert list(client.files.list(purpose="fine-tune")) == []
    page = client.files.list(limit=2)
    assert (page.has_more, page.first_id, page.last_id) == (True, made[4], made[3])  # type: ignore[attr-defined]


BAD_ROWS = {
    b"{": "line 3: is not JSON",
    b"[1]": "line 3: is a list, not an object",
    b"\xff\xfe": "line 3: is not UTF-8",
    b"[" * 100_000: "line 3: is nested too deep",
    b'{"messages": [], "messages": []}': "the key 'messages' is there twice",
    b'{"text": "x", "label": "y"}': "has none of 'messages'",
    b'{"messages": []}': "is empty",
    b'{"messages": [{"content": "x"}]}': "message 1: Discriminator 'role' is missing in value",
    b'{"messages": [{"role": "robot", "content": "x"}]}': 'message 1: role "robot"',
    b'{"messages": [{"role": "user", "content": "x", "weight": 1}, {"role": "assistant", "content": "y"}]}': 'message 1 contains an extra "weight"',
    b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 2}]}': "message 2: weight 2 is not 0 or 1",
    b'{"messages": [{"role": "user", "content": "x"}]}': "no message of the assistant",
    b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}': "have weight 0",
    b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]}': "message 1: 'content' is missing",
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}, {"role": "assistant", "content": "y"}]}': "holds an image",
    b'{"prompt": "x", "completion": 5}': "'completion' is a number",
    b'{"preferred_output": [], "non_preferred_output": []}': "'input' is missing",
    b'{"input": {"messages": [{"role": "user", "content": "x"}]}, "preferred_output": [{"role": "assistant", "content": "x"}], "non_preferred_output": "x"}': "'non_preferred_output' is missing",
}  # fmt: skip


@pytest.mark.parametrize(("bad", "says"), BAD_ROWS.items(), ids=range(len(BAD_ROWS)))
def test_a_bad_row_is_told_by_its_line(client: Any, bad: bytes, says: str) -> None:
    content = jsonl(chat(2)) + bad + b"\n" + jsonl(chat(2))
    error = refused(lambda: client.files.create(file=content, purpose="fine-tune"))
    assert error["code"] == "invalid_file_format" and says in error["message"]
    assert error["problems"][0]["line"] == 3 and error["wrong"] == 1


def test_all_problems_of_a_file_are_told_at_once(client: Any) -> None:
    error = refused(lambda: client.files.create(file=b'{"a": 1}\n' * 30, purpose="fine-tune"))
    assert [p["line"] for p in error["problems"]] == list(range(1, 31))
    assert "and 25 more" in error["message"]
    mixed = refused(lambda: client.files.create(file=jsonl(chat(12) + pairs(1)), purpose="fine-tune"))
    assert mixed["problems"] == [{"line": 13, "message": "is a row of kind preference in a file of chat rows"}]


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"messages": 1}),
        gzip.compress(jsonl(chat(20))),
        gzip.compress(b"0" * 50_000_000),  # a bomb that nobody unpacks
        b"PK\x03\x04" + b"\0" * 100,
        b"\0" * 1000,
        b"",
        b"\n\n",
    ],
)
def test_what_is_no_jsonl_is_refused_and_nothing_is_kept(api: Running, client: Any, content: bytes) -> None:
    before = sorted(api.service.settings.folder.glob("artifacts/**/*"))
    refused(lambda: client.files.create(file=content, purpose="fine-tune"))
    assert sorted(api.service.settings.folder.glob("artifacts/**/*")) == before


def test_a_file_that_is_too_large_is_refused(api: Running, client: Any) -> None:
    error = refused(lambda: client.files.create(file=jsonl(chat(5000)), purpose="fine-tune"), openai.APIStatusError)
    assert error["code"] == "file_too_large"
    refused(lambda: client.files.create(file=b"0" * 200_001, purpose="user_data"), openai.APIStatusError)


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_is_read_no_further_than_a_file_may_be_large(api: Running, announced: bool) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n' + b"0" * 3_000_000
    headers = {"Authorization": f"Bearer {api.secret}", "Content-Type": "multipart/form-data; boundary=x"}
    content: Any = body if announced else (body[i : i + 65536] for i in range(0, len(body), 65536))
    answer = httpx2.post(f"{api.url}/v1/files", headers=headers, content=content)
    assert answer.status_code == 413 and answer.json()["error"]["code"] == "request_too_large"


def test_wrong_fields_name_themselves(client: Any) -> None:
    assert refused(lambda: client.files.create(file=b"x", purpose="nonsense"))["param"] == "purpose"
    seconds = {"anchor": "created_at", "seconds": 1}
    wrong = refused(lambda: client.files.create(file=b"x", purpose="batch", expires_after=seconds))
    assert wrong["param"] == "expires_after[seconds]"
    assert client.files.list(after="file-none").data == []
    refused(lambda: client.files.list(limit=0))
    for id in ("file-none", "..%2F..%2Fetc%2Fpasswd", "../../etc/passwd"):
        refused(lambda id=id: client.files.retrieve(id), openai.NotFoundError)


def test_a_large_file_comes_in_parts(api: Running, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = jsonl(chat(40))
    whole = client.uploads.upload_file_chunked(
        file=content,
        filename="big.jsonl",
        bytes=len(content),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=1000,
    )
    assert whole.status == "completed" and whole.file.filename == "big.jsonl"
    assert client.files.content(whole.file.id).content == content
    upload = client.uploads.create(bytes=6, filename="x", mime_type="text/plain", purpose="user_data")
    b, a = (client.uploads.parts.create(upload.id, data=piece).id for piece in (b"def", b"abc"))
    assert refused(lambda: client.uploads.parts.create(upload.id, data=b"more"))["param"] == "data"
    assert refused(lambda: client.uploads.complete(upload.id, part_ids=[a]))["param"] == "part_ids"
    assert refused(lambda: client.uploads.complete(upload.id, part_ids=[a, a]))["param"] == "part_ids"
    assert (
        refused(lambda: client.uploads.complete(upload.id, part_ids=[a, b], md5="0" * 32))["code"]
        == "checksum_mismatch"
    )
    done = client.uploads.complete(upload.id, part_ids=[a, b], md5=hashlib.md5(b"abcdef").hexdigest())
    assert client.files.content(done.file.id).content == b"abcdef"
    assert not list(api.service.settings.folder.glob("artifacts/uploads/*"))
    refused(lambda: client.uploads.cancel(upload.id))
    other = client.uploads.create(bytes=6, filename="x", mime_type="text/plain", purpose="user_data")
    monkeypatch.setattr(uploads, "LARGEST_PART", 2)
    large = refused(lambda: client.uploads.parts.create(other.id, data=b"abc"), openai.APIStatusError)
    assert large["code"] == "part_too_large"
    assert client.uploads.cancel(other.id).status == "cancelled"
    refused(lambda: client.uploads.parts.create(other.id, data=b"abc"))
    refused(
        lambda: client.uploads.create(bytes=9 << 30, filename="x", mime_type="x", purpose="batch"),
        openai.APIStatusError,
    )


def test_an_upload_completed_twice_is_one_file(api: Running, client: Any) -> None:
    expires = {"anchor": "created_at", "seconds": 7200}
    ask = {"bytes": 3, "filename": "x", "mime_type": "text/plain", "purpose": "user_data"}
    upload = client.uploads.create(**ask, expires_after=expires)
    part = client.uploads.parts.create(upload.id, data=b"abc").id
    done = [client.uploads.complete(upload.id, part_ids=[part]).file for _ in range(2)]
    assert done[0].id == done[1].id and done[0].expires_at == done[0].created_at + 7200
    refused(lambda: client.uploads.cancel(upload.id))
    gone = client.uploads.create(**ask)
    client.uploads.cancel(gone.id)
    told = [(line["action"], line["target"]) for line in api.service.store.audit.export()]
    assert told[-2:] == [("upload.create", gone.id), ("upload.cancel", gone.id)]


def test_a_part_that_comes_after_the_end_is_not_kept(
    api: Running, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = client.uploads.create(bytes=3, filename="x", mime_type="text/plain", purpose="user_data")
    put = api.service.artifacts.put

    def late(*args: Any) -> Any:
        client.uploads.cancel(upload.id)
        return put(*args)

    monkeypatch.setattr(api.service.artifacts, "put", late)
    refused(lambda: client.uploads.parts.create(upload.id, data=b"abc"))
    assert not [p for p in Path(api.service.artifacts.root).glob(f"uploads/{upload.id}/*") if p.is_file()]


def test_deleting_bytes_holds_up_nobody(api: Running, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, forget = api.upload(), api.service.artifacts.delete
    wrote: list[str] = []

    def slow(key: str) -> None:
        with api.service.store.write() as session:  # would wait for the lock of a transaction around it
            session.execute(sa.text("UPDATE keys SET rpm = rpm"))
        wrote.append(key)
        forget(key)

    monkeypatch.setattr(api.service.artifacts, "delete", slow)
    assert client.files.delete(made).deleted and wrote == [f"files/{made}"]


def test_pages_go_on_when_their_last_row_has_gone(api: Running) -> None:
    client = api.client(project=api.service.store.keys.create_project("pruned").id)
    made = [client.files.create(file=b"x", purpose="user_data").id for _ in range(3)]
    client.files.delete(made[2])
    assert client.files.list(after=made[2]).data == [] and len(client.files.list(after=made[1]).data) == 1
    other = api.client(project=api.service.store.keys.create_project("looking").id)
    other.files.create(file=b"x", purpose="user_data")
    assert other.files.list(after=made[1], order="asc").data == []  # nothing is told of others' rows


def test_a_body_is_only_read_of_those_who_have_a_key(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.formparsers import MultiPartParser

    read: list[str] = []
    parse = MultiPartParser.parse

    async def watched(parser: Any) -> Any:
        read.append("a body")
        return await parse(parser)

    monkeypatch.setattr(MultiPartParser, "parse", watched)
    for secret, status in (("sk-none", 401), (api.secret, 200)):
        headers, parts = {"Authorization": f"Bearer {secret}"}, {"file": b"0" * 100_000}
        answer = httpx2.post(f"{api.url}/v1/files", headers=headers, files=parts, data={"purpose": "user_data"})
        assert answer.status_code == status
        assert bool(read) == (status == 200)


def test_what_is_over_is_deleted_with_its_bytes(api: Running, client: Any) -> None:
    """Files and unfinished uploads whose time is over; a file that a job still needs stays until the job has ended."""
    ends = {"anchor": "created_at", "seconds": 3600}
    gone, needed = (client.files.create(file=jsonl(chat()), purpose="fine-tune", expires_after=ends) for _ in range(2))
    kept = client.files.create(file=b"x", purpose="user_data", expires_after=ends)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=needed.id)
    upload = client.uploads.create(filename="a.txt", purpose="user_data", mime_type="text/plain", bytes=10)
    client.uploads.parts.create(upload.id, data=b"12345")
    folder = api.service.artifacts.path
    parts = api.service.settings.folder / "artifacts/uploads" / upload.id
    assert any(p.is_file() for p in parts.rglob("*"))
    with api.service.store.write() as session:
        for table, ids in ((tables.File, [gone.id, needed.id]), (tables.Upload, [upload.id])):
            session.execute(sa.update(table).where(table.id.in_(ids)).values(expires_at=1))
    wait(lambda: not folder(f"files/{gone.id}").exists() and not parts.exists(), "the end of a file and an upload")
    refused(lambda: client.files.retrieve(gone.id), openai.NotFoundError)
    assert client.files.retrieve(kept.id).id == kept.id and folder(f"files/{needed.id}").exists()
    wrong = refused(lambda: client.uploads.parts.create(upload.id, data=b"67890"))
    assert "expired" in wrong["message"]
    client.fine_tuning.jobs.cancel(job.id)
    wait(lambda: not folder(f"files/{needed.id}").exists(), "the end of the job's file")
    log = [(line["action"], line["target"], line["key"]) for line in api.service.store.audit.export()]
    assert {("file.expire", gone.id, None), ("file.expire", needed.id, None)} <= set(log)
