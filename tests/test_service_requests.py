"""Fine-tuning jobs as they are asked for, without a worker: what a new one says, which are refused and why."""

from __future__ import annotations

import re
from typing import Any

import httpx2
import pytest
import sqlalchemy as sa

from tests import service
from tests.service import Running, chat, events, jsonl, openai, pairs, refused
from tunesmith.store import tables

api, client, file = service.api, service.client, service.file


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
    ({"extra_body": {"gate": ["pass_at_1.low > 0"]}}, "gate", "invalid_settings"),
    ({"extra_body": {"gate": {"conditions": [" sql>0"]}}}, "gate", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["pass_at_1"]}, "data": {"split": {"by": "tests"}}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["sql"]}, "data": {"split": {"by": "database"}}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["bertscore"]}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": ["schema_valid"]}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": 5}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"evaluate": {"metrics": [{}]}}}, "evaluate.metrics", "invalid_settings"),
    ({"extra_body": {"train": {"best_by": "os:popen"}}}, "train.best_by", "invalid_settings"),
    ({"extra_body": {"gate": ["goal.diff > 0"]}}, "gate.conditions", "invalid_settings"),
    ({"extra_body": {"data": {"split": "random"}}}, "data.split", "invalid_settings"),
    ({"extra_body": {"data": {"split": [1]}}}, "data.split", "invalid_settings"),
    ({"extra_body": {"data": {"clean": ["personal"]}}}, "data.clean", "invalid_settings"),
    ({"extra_body": {"data": {"clean": {"personal": {"names": "/etc"}}}}}, "data.clean.personal.names", "invalid_settings"),
    ({"extra_body": {"data": {"clean": {"duplicates": {"kind": "semantic", "model": "a/b"}}}}}, "data.clean.duplicates.model", "invalid_settings"),
    ({"extra_body": {"train": {"adapter": "prompt"}}}, "train.adapter", "invalid_settings"),
    ({"extra_body": {"train": {"adapter": {"kind": "bottleneck", "size": 4}}}}, "train.adapter", "invalid_settings"),
    ({"extra_body": {"train": {"adapter": "lara"}}}, "train.adapter", "invalid_settings"),
    ({"extra_body": {"train": {"adapter": {"kind": []}}}}, "train.adapter", "invalid_settings"),
    ({"extra_body": {"train": {"adapter": {"kind": "full", "rank": 4}}}}, "train.adapter.rank", "invalid_settings"),
    ({"extra_body": {"resources": {"cores": 0}}}, "resources.cores", None),
]  # fmt: skip


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


def test_what_is_no_lora_is_made_while_there_is_room_to_serve_it(client: Any, api: Running, file: str) -> None:
    def ask(**more: Any) -> Any:
        return client.fine_tuning.jobs.create(**{"model": "tiny", "training_file": file} | more)

    def adapter(kind: Any) -> dict[str, Any]:
        return {"extra_body": {"train": {"adapter": kind}}}

    kinds = ("full", {"kind": "lora", "dora": True}, {"kind": "lora", "targets": ["experts"]}, "loha")
    jobs = [ask(**adapter(kind)).id for kind in kinds[:2]]
    for kind in kinds:
        full = refused(lambda kind=kind: ask(**adapter(kind)))
        assert (full["param"], full["code"]) == ("train.adapter", "no_room_to_serve")
    ask(**adapter({"kind": "lora", "rslora": True}))
    client.fine_tuning.jobs.cancel(jobs[0])
    names = {whole: f"ft:tiny:default::{'whole' if whole else 'lora'}" for whole in (True, False)}
    project = api.service.store.keys.projects()[0].id
    with api.service.store.write() as session:
        for whole, name in names.items():
            about = {"project": project, "base": "tiny", "job": "ftjob-x", "artifact": f"models/{whole}/final"}
            session.add(tables.Model(id=name, whole=whole, step=None, created_at=1, **about))
    for whole, kind, says in ((True, "lora", "as a whole only"), (True, "loha", "as a whole"), (False, "full", "LoRA")):
        wrong = refused(lambda w=whole, k=kind: ask(model=names[w], **adapter(k)))
        assert wrong["param"] == "train.adapter" and says in wrong["message"]
    assert refused(lambda: ask(model=names[True], **adapter("full")))["code"] == "no_room_to_serve"
    client.fine_tuning.jobs.cancel(jobs[1])
    client.fine_tuning.jobs.cancel(ask(model=names[True], **adapter("full")).id)
    with api.service.store.write() as session:
        for name in names.values():
            session.delete(session.scalar(sa.select(tables.Model).where(tables.Model.id == name)))


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


@pytest.mark.proof
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
