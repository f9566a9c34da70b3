"""The fine-tuning API without a worker, by OpenAI's own client: files, uploads, jobs that are refused, keys, webhooks."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import pickle
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from tests.service import Running, chat, events, jsonl, openai, pairs, running, settings


@pytest.fixture(scope="module")
def api(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(settings(tmp_path_factory.mktemp("api"), tiny_model, max_file=200_000)) as found:
        yield found


@pytest.fixture
def client(api: Running) -> Any:
    return api.client()


def refused(call: Any, kind: Any = None) -> dict[str, Any]:
    """The error's object, which has all four keys."""
    with pytest.raises(kind or openai.BadRequestError) as told:
        call()
    assert told.value.response.headers["x-request-id"]
    error: dict[str, Any] = told.value.response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error)
    assert "Traceback" not in error["message"] and "/tmp" not in error["message"]
    return error


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


def test_nobody_sees_anothers(api: Running, client: Any) -> None:
    other = api.client(project=api.service.store.keys.create_project("other").id, role="admin")
    file = api.upload()
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    for call in (
        lambda: other.files.retrieve(file),
        lambda: other.files.content(file),
        lambda: other.files.delete(file),
        lambda: other.fine_tuning.jobs.retrieve(job.id),
        lambda: other.fine_tuning.jobs.cancel(job.id),
        lambda: other.fine_tuning.jobs.list_events(job.id),
        lambda: other.fine_tuning.jobs.checkpoints.list(job.id),
    ):
        refused(call, openai.NotFoundError)
    assert refused(lambda: other.fine_tuning.jobs.create(model="tiny", training_file=file))["param"] == "training_file"
    assert list(other.files.list()) == [] and list(other.fine_tuning.jobs.list()) == []


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


def test_a_large_file_comes_in_parts(api: Running, client: Any) -> None:
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
    assert client.uploads.cancel(other.id).status == "cancelled"
    refused(lambda: client.uploads.parts.create(other.id, data=b"abc"))
    refused(
        lambda: client.uploads.create(bytes=9 << 30, filename="x", mime_type="x", purpose="batch"),
        openai.APIStatusError,
    )


def test_a_new_job_has_every_key(client: Any, api: Running) -> None:
    file = api.upload()
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file, suffix="mine", seed=3, metadata={"team": "a"}
    )
    strict = openai.types.fine_tuning.FineTuningJob.model_validate(job.to_dict())
    assert strict.status == "validating_files" and strict.seed == 3 and strict.result_files == []
    assert job.hyperparameters.n_epochs == "auto" and job.error is None and job.metadata == {"team": "a"}
    assert set(job.to_dict()) == {
        *(
            "id",
            "object",
            "created_at",
            "finished_at",
            "model",
            "fine_tuned_model",
            "organization_id",
            "status",
            "error",
        ),
        *("training_file", "validation_file", "result_files", "hyperparameters", "method", "seed", "trained_tokens"),
        *(
            "estimated_finish",
            "integrations",
            "metadata",
            "user_provided_suffix",
            "usage_metrics",
            "shared_with_openai",
        ),
    }
    assert [e.message for e in events(client, job.id)] == [f"Created fine-tuning job: {job.id}"]
    found = client.fine_tuning.jobs.list(extra_query={"metadata[team]": "a"})
    assert [j.id for j in found] == [job.id]
    assert job.id not in [j.id for j in client.fine_tuning.jobs.list(extra_query={"metadata": "null"})]
    active = refused(lambda: client.files.delete(file))
    assert active["code"] == "file_in_use" and job.id in active["message"]
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    gone = client.files.delete(file).to_dict()
    assert gone["dependents"]["jobs"] == [job.id]


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


def test_a_retried_request_makes_one_job(client: Any, api: Running) -> None:
    file = api.upload()
    ask = {"model": "tiny", "training_file": file, "seed": 1}
    first = client.fine_tuning.jobs.create(**ask)
    again = client.fine_tuning.jobs.create(**ask, extra_headers={"x-stainless-retry-count": "1"})
    other = client.fine_tuning.jobs.create(**ask)
    assert first.id == again.id != other.id


BAD_JOBS: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": "gpt-4o"}, "model", "model_not_available"),
    ({"model": "ft:tiny:default::none"}, "model", "model_not_available"),
    ({"model": "../../etc/passwd"}, "model", "model_not_available"),
    ({"training_file": "file-none"}, "training_file", "file_not_found"),
    ({"validation_file": "file-none"}, "validation_file", "file_not_found"),
    ({"suffix": ""}, "suffix", None),
    ({"suffix": "x" * 65}, "suffix", None),
    ({"seed": -1}, "seed", None),
    ({"metadata": {"a": "x" * 513}}, "metadata", None),
    ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", None),
    ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", None),
    ({"hyperparameters": {"n_epochs": 51}}, "hyperparameters.n_epochs", None),
    ({"hyperparameters": {"batch_size": "many"}}, "hyperparameters.batch_size", None),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"learning_rate_multiplier": 0}}}}, "method.supervised.hyperparameters.learning_rate_multiplier", None),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}}, "method.dpo.hyperparameters.beta", None),
    ({"method": {"type": "reinforcement", "reinforcement": {"grader": {"type": "string_check"}}}}, "method.type", "unsupported_method"),
    ({"method": {"type": "dpo"}}, "training_file", "invalid_training_file"),
    ({"integrations": [{"type": "wandb"}]}, "integrations.0.wandb", None),
    ({"extra_body": {"nonsense": 1}}, "nonsense", None),
    ({"extra_body": {"train": {"lerning_rate": 1}}}, "train.lerning_rate", "invalid_settings"),
    ({"extra_body": {"train": {"start_from": "/etc"}}}, "train.start_from", "invalid_settings"),
    ({"extra_body": {"train": {"trackers": ["wandb"]}}}, "train.trackers", "invalid_settings"),
    ({"extra_body": {"train": {"method": "distill"}}}, "train.method", "invalid_settings"),
    ({"extra_body": {"data": {"sources": ["/etc/passwd"]}}}, "data.sources", "invalid_settings"),
    ({"extra_body": {"data": {"split": {"test": "/etc/passwd"}}}}, "data.split.test", "invalid_settings"),
    ({"extra_body": {"data": {"clean": {"contamination": {"against": ["/etc/passwd"]}}}}}, "data.clean.contamination", "invalid_settings"),
    ({"extra_body": {"evaluate": {"judge": {"model": "http://169.254.169.254/v1#x"}}}}, "evaluate.judge", "invalid_settings"),
    ({"extra_body": {"goal": {"metric": "/tmp/x.py:f"}}}, "goal.metric", "invalid_settings"),
    ({"extra_body": {"goal": {"metric": "os:popen"}}}, "goal.metric", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["loss", "os:popen"]}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["pass_at_1"]}, "data": {"split": {"by": "tests"}}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["sql"]}, "data": {"split": {"by": "database"}}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["bertscore"]}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["schema_valid"]}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": 5}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": [{}]}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"train": {"best_by": "os:popen"}}}, "train.best_by", "invalid_settings"),
    ({"extra_body": {"data": {"split": "random"}}}, "data.split", "invalid_settings"),
    ({"extra_body": {"data": {"split": [1]}}}, "data.split", "invalid_settings"),
    ({"extra_body": {"data": {"clean": ["personal"]}}}, "data.clean", "invalid_settings"),
    ({"extra_body": {"data": {"clean": {"personal": {"names": "/etc"}}}}}, "data.clean.personal.names", "invalid_settings"),
    ({"extra_body": {"data": {"clean": {"duplicates": {"kind": "semantic", "model": "a/b"}}}}}, "data.clean.duplicates.model", "invalid_settings"),
    ({"extra_body": {"train": {"adapter": "full"}}}, "train.adapter", "invalid_settings"),
    ({"extra_body": {"train": {"adapter": {"kind": "lora", "dora": True}}}}, "train.adapter", "invalid_settings"),
    ({"extra_body": {"resources": {"cores": 0}}}, "resources.cores", None),
]  # fmt: skip


@pytest.fixture(scope="module")
def file(api: Running) -> str:
    return api.upload()


@pytest.mark.parametrize(("wrong", "param", "code"), BAD_JOBS, ids=[str(i) for i in range(len(BAD_JOBS))])
def test_what_a_job_is_refused_names_the_field(
    client: Any, file: str, wrong: dict[str, Any], param: str, code: str | None
) -> None:
    error = refused(lambda: client.fine_tuning.jobs.create(**({"model": "tiny", "training_file": file} | wrong)))
    assert error["param"] == param and (code is None or error["code"] == code), error
    assert error["type"] == "invalid_request_error"


def test_files_must_suit_the_job(client: Any, api: Running) -> None:
    few = refused(lambda: client.fine_tuning.jobs.create(model="tiny", training_file=api.upload(chat(3))))
    assert few["code"] == "invalid_n_examples"
    assert few["message"] == "Training file has 3 example(s), but must have at least 10 examples"
    other = client.files.create(file=b"x", purpose="batch").id
    wrong = refused(lambda: client.fine_tuning.jobs.create(model="tiny", training_file=other))
    assert wrong["code"] == "invalid_file_purpose"
    made = client.fine_tuning.jobs.create(model="tiny", training_file=api.upload(pairs()), method={"type": "dpo"})
    assert made.method.dpo.hyperparameters.beta == "auto"
    grading = refused(
        lambda: client.fine_tuning.alpha.graders.validate(
            grader={"type": "string_check", "name": "x", "input": "a", "reference": "b", "operation": "eq"}
        )
    )
    assert grading["code"] == "unsupported_method"


def test_what_a_status_does_not_allow_is_a_400(client: Any, file: str) -> None:
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    assert refused(lambda: client.fine_tuning.jobs.pause(job.id))["code"] == "invalid_status"
    assert refused(lambda: client.fine_tuning.jobs.resume(job.id))["code"] == "invalid_status"
    client.fine_tuning.jobs.cancel(job.id)
    assert "already been cancelled" in refused(lambda: client.fine_tuning.jobs.cancel(job.id))["message"]
    refused(lambda: client.fine_tuning.jobs.retrieve("ftjob-none"), openai.NotFoundError)


def test_pages_follow_after(client: Any, file: str) -> None:
    made = [client.fine_tuning.jobs.create(model="tiny", training_file=file).id for _ in range(5)]
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)][:5] == made[::-1]
    second = client.fine_tuning.jobs.list(limit=2, after=made[3])
    assert [job.id for job in second.data] == [made[2], made[1]] and second.has_more


def test_pages_go_on_when_their_last_row_has_gone(api: Running) -> None:
    client = api.client(project=api.service.store.keys.create_project("pruned").id)
    made = [client.files.create(file=b"x", purpose="user_data").id for _ in range(3)]
    client.files.delete(made[2])
    assert client.files.list(after=made[2]).data == [] and len(client.files.list(after=made[1]).data) == 1
    other = api.client(project=api.service.store.keys.create_project("looking").id)
    other.files.create(file=b"x", purpose="user_data")
    assert other.files.list(after=made[1], order="asc").data == []  # nothing is told of others' rows


def test_a_key_gives_no_more_than_it_has(api: Running) -> None:
    at = f"/organization/projects/{api.service.store.keys.create_project('held').id}"
    held = api.client(role="admin", scopes=("admin", "files"))
    ask = {"cast_to": object, "body": {"name": "x", "scopes": ["files", "jobs"]}}
    error = refused(lambda: held.post(f"{at}/api_keys", **ask), openai.PermissionDeniedError)
    assert error["param"] == "scopes"
    assert held.post(f"{at}/api_keys", cast_to=object, body={"name": "x"})["scopes"] == ["admin", "files"]
    ask["body"] = {"name": "x", "scopes": ["files"]}
    assert held.post(f"{at}/api_keys", **ask)["scopes"] == ["files"]
    person = api.client(role="admin").post(f"{at}/users", cast_to=object, body={"name": "Bo", "role": "viewer"})
    ask["body"] = {"name": "x", "scopes": ["files"], "user": person["id"]}
    assert "viewer" in refused(lambda: held.post(f"{at}/api_keys", **ask))["message"]
    ask["body"]["role"] = "viewer"
    assert held.post(f"{at}/api_keys", **ask)["role"] == "viewer"


def test_metadata_is_found_by_any_key(client: Any, file: str) -> None:
    odd = {'a"b': "x", "a.b[0]": "y", "back\\slash": "z", "plain": "A"}
    made = client.fine_tuning.jobs.create(model="tiny", training_file=file, metadata=odd)
    for key, value in odd.items():
        assert made.id in [job.id for job in client.fine_tuning.jobs.list(metadata={key: value})], key
        assert made.id not in [job.id for job in client.fine_tuning.jobs.list(metadata={key: value.swapcase() + "-"})]
    assert list(client.fine_tuning.jobs.list(metadata={"plain": "a"})) == []
    assert list(client.fine_tuning.jobs.list(metadata={'"': "x"})) == []


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"metadata": {"a": "x\0"}}, "metadata.a"),
        ({"metadata": {"a\0": "x"}}, "metadata"),
        ({"suffix": "a\0b"}, "suffix"),
        ({"extra_body": {"data": {"system": "\0"}}}, "data.system"),
    ],
)
def test_what_a_database_can_not_keep_is_a_400(client: Any, file: str, wrong: dict[str, Any], param: str) -> None:
    error = refused(lambda: client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": file} | wrong))
    assert error["param"] == param


def test_a_number_without_end_is_a_400(api: Running, file: str) -> None:
    headers = {"Authorization": f"Bearer {api.secret}", "content-type": "application/json"}
    for part in ('"train": {"learning_rate": 1e999}', '"resources": {"memory_gib": 1e999}'):
        body = f'{{"model": "tiny", "training_file": "{file}", {part}}}'
        answer = httpx2.post(f"{api.url}/v1/fine_tuning/jobs", headers=headers, content=body)
        assert answer.status_code == 400, answer.text


def test_keys_roles_and_scopes(api: Running, file: str) -> None:
    wrong = openai.OpenAI(base_url=f"{api.url}/v1", api_key="sk-wrong", max_retries=0)
    assert refused(lambda: wrong.files.list(), openai.AuthenticationError)["code"] == "invalid_api_key"
    viewer, runner = api.client(role="viewer"), api.client(role="runner")
    assert list(viewer.files.list())
    for call in (
        lambda: viewer.files.create(file=b"x", purpose="batch"),
        lambda: viewer.files.delete(file),
        lambda: viewer.fine_tuning.jobs.create(model="tiny", training_file=file),
        lambda: runner.post("/webhooks", cast_to=object, body={"url": "http://example.com"}),
        lambda: runner.get("/organization/projects", cast_to=object),
        lambda: runner.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"priority": 5}),
        lambda: api.client(scopes=("jobs",)).files.list(),
        lambda: api.client(role="runner", scopes=("files",)).fine_tuning.jobs.create(model="tiny", training_file=file),
    ):
        refused(call, openai.PermissionDeniedError)
    late = api.client(expires_at=int(time.time()) - 1)
    refused(lambda: late.files.list(), openai.AuthenticationError)


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


def test_projects_people_and_keys(api: Running, client: Any) -> None:
    def call(method: str, path: str, body: Any = None, by: Any = client) -> Any:
        return getattr(by, method)(path, cast_to=object, **({"body": body} if body is not None else {}))

    project = call("post", "/organization/projects", {"name": "team-x"})
    at = f"/organization/projects/{project['id']}"
    ada = call("post", f"{at}/users", {"name": "Ada", "role": "admin"})
    made = call("post", f"{at}/api_keys", {"name": "hers", "role": "admin", "user": ada["id"], "rpm": 60})
    theirs = openai.OpenAI(base_url=f"{api.url}/v1", api_key=made["value"], max_retries=0)
    assert [p["id"] for p in call("get", "/organization/projects", by=theirs)["data"]] == [project["id"]]
    refused(lambda: call("post", "/organization/projects", {"name": "more"}, theirs), openai.PermissionDeniedError)
    mine = api.service.store.keys.projects()[0].id
    refused(lambda: call("get", f"/organization/projects/{mine}/api_keys", by=theirs), openai.NotFoundError)
    refused(lambda: call("post", f"{at}/api_keys", {"name": "x", "role": "owner"}))
    refused(lambda: call("post", f"{at}/api_keys", {"name": "x", "scopes": ["all"]}))
    listed = call("get", f"{at}/api_keys", by=theirs)["data"]
    assert [k["id"] for k in listed] == [made["id"]] and "value" not in listed[0]
    assert call("delete", f"{at}/users/{ada['id']}")["dependents"] == {"keys": 1}
    refused(lambda: theirs.files.list(), openai.AuthenticationError)
    lines = httpx2.get(f"{api.url}/v1/organization/audit_logs", headers={"Authorization": f"Bearer {api.secret}"}).text
    told = [json.loads(line) for line in lines.splitlines()]
    assert [t["action"] for t in told if t["project"] == project["id"]] == [
        "project.create", "user.create", "key.create", "user.delete",
    ]  # fmt: skip
    assert made["value"] not in lines


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x", "http://localhost:8000/", "http://10.0.0.1/", "http://192.168.1.1/", "http://169.254.169.254/latest",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/", "http://2130706433/", "http://0x7f000001/", "http://100.64.0.1/",
        "file:///etc/passwd", "ftp://example.com/", "gopher://x", "http://user:pass@example.com/", "http:///x", "nonsense", "http://x:99999/",
        "http://[::127.0.0.1]/", "http://[fec0::1]/", "http://no-such-host.invalid/",
    ],
)  # fmt: skip
def test_webhooks_never_lead_inside(client: Any, url: str) -> None:
    error = refused(lambda: client.post("/webhooks", cast_to=object, body={"url": url}))
    assert error["param"] == "url" and error["code"] == "invalid_url"


def test_a_webhook_that_turns_inside_later_is_not_called_either() -> None:
    from tunesmith.jobs.webhooks import new_secret, send

    for host in ("127.0.0.1", "[::127.0.0.1]", "[fec0::1]"):
        assert send(f"http://{host}:1/", new_secret(), "evt_1", {}) == "InvalidIPAddress"


def test_a_webhook_that_never_answers_delays_no_other(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import store
    from tunesmith.jobs import webhooks
    from tunesmith.store.tables import Delivery, Webhook

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if "drip" in self.path:  # a byte now and then, for ever
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(b"H")
                        time.sleep(0.1)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(webhooks, "LONGEST", 0.5)
    opened = store.open(database)
    project = opened.keys.create_project("p").id
    with opened.write() as session:
        for name in ("drip", "good"):
            at = f"http://127.0.0.1:{server.server_port}/{name}"
            session.add(
                Webhook(id=name, project=project, url=at, events=[], secret=webhooks.new_secret(), created_at=1)
            )
            session.flush()
            for i in range(30 if name == "drip" else 2):
                id = f"{name}-{i}"
                session.add(Delivery(id=id, webhook=name, type="x", payload={}, created_at=1, next_at=1.0))
                session.flush()
    assert webhooks.deliver(opened, private=True) == 6
    with opened.read() as session:
        rows = {row.id: row for row in session.query(Delivery)}
    assert rows["good-0"].delivered_at and rows["good-1"].delivered_at
    assert rows["drip-0"].last_error and rows["drip-0"].next_at > time.time() and rows["drip-4"].attempts == 0
    server.shutdown()
    opened.close()


def test_checkpoint_permissions(api: Running, client: Any) -> None:
    from tunesmith.store.tables import Model

    keys = api.service.store.keys
    mine, other = keys.caller(api.secret).project, keys.create_project("guest").id  # type: ignore[union-attr]
    name = "ft:tiny:default:a/b:x:ckpt-step-3"
    with api.service.store.write() as session:
        session.add(
            Model(id=name, project=mine, base="tiny", job="ftjob-x", step=3, artifact="models/x/step-3", created_at=1)
        )
    of = client.fine_tuning.checkpoints.permissions
    made = of.create(name, project_ids=[other])
    assert [(p.project_id, p.object) for p in made] == [(other, "checkpoint.permission")]
    assert [p.id for p in of.list(name)] == [p.id for p in made]
    assert refused(lambda: of.create(name, project_ids=["proj_none"]))["param"] == "project_ids"
    refused(lambda: of.create("ft:none", project_ids=[other]), openai.NotFoundError)
    assert of.delete(made.data[0].id, fine_tuned_model_checkpoint=name).deleted
    assert list(of.list(name)) == []


def test_deleting_a_model_deletes_its_weights(api: Running, client: Any) -> None:
    from tunesmith.store.tables import Model

    mine = api.service.store.keys.caller(api.secret).project  # type: ignore[union-attr]
    api.service.artifacts.put("models/gone/adapter.safetensors", io.BytesIO(b"weights"))
    with api.service.store.write() as session:
        session.add(
            Model(
                id="ft:tiny:default::gone",
                project=mine,
                base="tiny",
                job="ftjob-x",
                step=None,
                artifact="models/gone",
                created_at=1,
            )
        )
    runner = api.client(role="runner")
    refused(lambda: runner.models.delete("ft:tiny:default::gone"), openai.PermissionDeniedError)
    gone = client.models.delete("ft:tiny:default::gone")
    assert gone.deleted and not api.service.artifacts.path("models/gone").exists()
    refused(lambda: client.models.delete("ft:tiny:default::gone"), openai.NotFoundError)
    assert not any(b"weights" in p.read_bytes() for p in api.service.settings.folder.rglob("*") if p.is_file())


def test_what_is_sent_wrong_never_shows_our_inside(api: Running) -> None:
    headers = {"Authorization": f"Bearer {api.secret}", "content-type": "application/json"}
    for body in (
        b"{",
        b"[]",
        b"null",
        b'{"model": 1}',
        b"\xff",
        b'{"model": "tiny", "training_file": {"a": 1}}',
        b"[" * 50_000,
    ):
        answer = httpx2.post(f"{api.url}/v1/fine_tuning/jobs", headers=headers, content=body)
        assert answer.status_code == 400, body[:20]
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
    for path in ("/v1/nothing", "/v1/files/a/b/c"):
        assert httpx2.get(f"{api.url}{path}", headers=headers).json()["error"]["code"] == "unknown_url"
    assert httpx2.post(f"{api.url}/v1/files", headers={"Authorization": f"Bearer {api.secret}"}).status_code == 400
    long = httpx2.get(f"{api.url}/v1/files/{'x' * 3000}", headers=headers)
    assert long.status_code in (400, 404) and re.search("error", long.text)


@pytest.mark.long
def test_litellm_drives_files_and_jobs(api: Running) -> None:
    litellm = pytest.importorskip("litellm")
    at: dict[str, Any] = {"custom_llm_provider": "openai", "api_base": f"{api.url}/v1", "api_key": api.secret}
    file = litellm.create_file(file=("rows.jsonl", jsonl(chat())), purpose="fine-tune", **at)
    made = litellm.create_fine_tuning_job(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": 2}, suffix="lite", **at
    )
    assert made.status == "validating_files" and made.hyperparameters.n_epochs == 2
    assert litellm.retrieve_fine_tuning_job(fine_tuning_job_id=made.id, **at).id == made.id
    assert made.id in [job.id for job in litellm.list_fine_tuning_jobs(limit=5, **at).data]
    assert litellm.cancel_fine_tuning_job(fine_tuning_job_id=made.id, **at).status == "cancelled"
