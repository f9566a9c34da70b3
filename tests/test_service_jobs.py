"""Jobs from end to end, with workers in processes of their own, by OpenAI's own client."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.conftest import write_jsonl
from tests.listening import Listening, Quiet
from tests.service import Running, chat, events, finished, openai, pairs, refused, running, settings, team, wait
from tunesmith.errors import ModelError, TrainingError
from tunesmith.jobs import child
from tunesmith.jobs.recipe import recipe_of, stages
from tunesmith.runs import read_jsonl
from tunesmith.store import tables

WANDB = """
import json, os
def note(**told):
    with open(os.environ["NOTED"], "a") as file:
        file.write(json.dumps(told, default=str) + chr(10))
class Run:
    def log(self, values, step): note(step=step, values=sorted(values))
    def finish(self, exit_code): note(finish=exit_code)
def init(**told):
    note(**told)
    return Run()
def Settings(**told): return told
def Html(text): return text
"""


@pytest.fixture(scope="module")
def noted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the workers' jobs tell W&B, whose library notes it here."""
    folder = tmp_path_factory.mktemp("wandb")
    (folder / "wandb.py").write_text(WANDB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("NOTED", str(folder / "noted.jsonl"))
        yield folder / "noted.jsonl"


@pytest.fixture(scope="module")
def api(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, noted: Path) -> Iterator[Running]:
    with running(settings(tmp_path_factory.mktemp("jobs"), tiny_model, private_webhooks=True)) as found, team(found):
        yield found


def files_of(api: Running, name: str) -> dict[str, str]:
    """Hashes of a model's files."""
    found = api.service.model(name)
    assert found is not None
    folder = api.service.artifacts.path(found.artifact)
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.suffix != ".md"}


class Hook:
    """A webhook's receiver, which refuses the first deliveries."""

    def __init__(self, refuses: int = 1) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        hook = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                hook.got.append(({k.lower(): v for k, v in self.headers.items()}, self.read()))
                self.send(status=500 if len(hook.got) <= refuses else 200)

        self.server = Listening(Handler)
        self.url = f"{self.server.url}/hook"


@dataclass
class Walk:
    """A job that was done, and what came of it."""

    client: Any
    files: tuple[str, str]  # to train on, to validate with
    done: Any
    config: dict[str, Any]  # its adapter's
    hook: Hook
    secret: str  # the webhook's


LORA = {"train": {"adapter": {"kind": "lora", "rank": 2, "alpha": 4}}}


@pytest.fixture(scope="module")
def walk(api: Running) -> Walk:
    client, hook = api.client(role="admin"), Hook()
    secret = client.post("/webhooks", cast_to=object, body={"url": hook.url})["secret"]
    training, validation = api.upload(chat(32)), api.upload(chat(4, "blue"))
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=training,
        validation_file=validation,
        suffix="My team's!",
        hyperparameters={"n_epochs": 4, "batch_size": 16, "learning_rate_multiplier": 2.5},
        integrations=[{"type": "wandb", "wandb": {"project": "colours", "name": "first", "tags": ["a", "b"]}}],
        extra_body=LORA,
    )
    done = finished(client, job.id)
    assert done.status == "succeeded", done
    config = json.loads((api.service.artifacts.path(f"models/{job.id}/final") / "adapter_config.json").read_text())
    return Walk(client, (training, validation), done, config, hook, secret)


def test_a_finished_job_names_its_model_and_what_it_took(walk: Walk) -> None:
    done = walk.done
    assert done.fine_tuned_model == f"ft:tiny:default:My-team-s-:{done.id[6:14]}"
    assert done.hyperparameters.to_dict() == {"n_epochs": 4, "batch_size": 16, "learning_rate_multiplier": 2.5}
    assert done.method.supervised.hyperparameters.n_epochs == 4
    assert done.trained_tokens > 0 and done.finished_at >= done.created_at and done.error is None
    openai.types.fine_tuning.FineTuningJob.model_validate(done.to_dict())
    assert walk.config["r"] == 2


def row_of(api: Running, id: str) -> Any:
    with api.service.store.read() as session:
        return session.scalar(sa.select(tables.Job).where(tables.Job.id == id))


def test_the_multiplier_is_of_the_rules_rate(api: Running, walk: Walk, tmp_path: Path) -> None:
    job = row_of(api, walk.done.id)
    rows = write_jsonl(tmp_path / "rows.jsonl", chat(32))
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 16}}}
    rates = {}
    for multiplier in (1.0, 0.5):
        keys = recipe_of(
            f"by-{multiplier}", api.service.settings.models["tiny"], 1, method, LORA, (str(rows), None), None, None
        )
        plan = child.planned({"recipe": keys, "multiplier": multiplier})
        child.walk(plan["recipe"], str(tmp_path / "runs"), list(stages(plan["recipe"])))
        lines = read_jsonl(tmp_path / f"runs/by-{multiplier}/metrics.jsonl")
        rates[multiplier] = max(line["learning_rate"] for line in lines), plan["recipe"]["train"]["learning_rate"]
    assert rates[0.5][0] == pytest.approx(rates[1.0][0] / 2) and rates[1.0][0] > 0
    assert rates[0.5][1] == pytest.approx(rates[1.0][1] / 2)
    assert job.recipe["train"]["learning_rate"] == pytest.approx(2.5 * rates[1.0][1])
    own = keys | {"train": keys["train"] | {"learning_rate": 3e-4}}  # which wins over hyperparameters
    assert child.planned({"recipe": own, "multiplier": 7.0})["recipe"]["train"]["learning_rate"] == 3e-4


@pytest.mark.proof
def test_what_is_no_lora_becomes_a_model_of_its_own(api: Running, tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    client, file = api.client(role="admin"), api.upload()

    def made(model: str, adapter: Any) -> tuple[Any, Any]:
        train = {"adapter": adapter, "learning_rate": 1e-2}
        ask = {"n_epochs": 1, "batch_size": 12}
        job = client.fine_tuning.jobs.create(
            model=model, training_file=file, hyperparameters=ask, extra_body={"train": train}
        )
        done = finished(client, job.id)
        assert done.status == "succeeded", done
        assert not client.fine_tuning.jobs.checkpoints.list(job.id).data
        row = api.service.model(done.fine_tuned_model)
        assert row is not None and row.whole
        folder = api.service.artifacts.path(row.artifact)
        assert (folder / "tokenizer.json").is_file() and not (folder / "adapter_config.json").exists()
        return done.fine_tuned_model, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    name, merged = made("tiny", {"kind": "lora", "rank": 2, "dora": True})
    assert merged.keys() == base.keys()
    q, norm = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
    assert not torch.equal(merged[q], base[q]) and torch.equal(merged[norm], base[norm])
    further, whole = made(name, {"kind": "partial", "only": "norms"})
    assert not torch.equal(whole[norm], merged[norm]) and torch.equal(whole[q], merged[q])
    for model in (name, further):
        client.models.delete(model)


def test_a_job_tells_what_happens(walk: Walk) -> None:
    told = events(walk.client, walk.done.id)
    said = [e.message for e in told if e.type == "message"]
    assert said[:4] == [
        f"Created fine-tuning job: {walk.done.id}",
        f"Validating training file: {walk.files[0]} and validation file: {walk.files[1]}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    assert said[-2:] == [
        f"New fine-tuned model created: {walk.done.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert sum(m.startswith("Checkpoint created at step") for m in said) == 4
    steps = [e for e in told if e.type == "metrics"]
    assert [e.data["step"] for e in steps] == list(range(1, 9))
    shown = r"Step 8/8: training loss=\d+\.\d\d, validation loss=\d+\.\d\d, full validation loss=\d+\.\d\d"
    assert re.fullmatch(shown, steps[-1].message)
    assert set(steps[-1].data) == {
        *("step", "total_steps", "train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy"),
        *("full_valid_loss", "full_valid_mean_token_accuracy"),
    }


def test_a_jobs_last_checkpoints_are_kept(api: Running, walk: Walk) -> None:
    marks = list(walk.client.fine_tuning.jobs.checkpoints.list(walk.done.id, limit=2))
    assert [c.step_number for c in marks] == [8, 6, 4]  # one an epoch, the last three
    assert marks[0].fine_tuned_model_checkpoint == f"{walk.done.fine_tuned_model}:ckpt-step-8"
    assert marks[0].metrics.full_valid_loss > 0
    assert not api.service.artifacts.path(f"models/{walk.done.id}/step-2").exists()


def test_a_jobs_figures_are_a_file(api: Running, walk: Walk) -> None:
    text = walk.client.files.content(walk.done.result_files[0]).text
    plain = walk.client.files.content(walk.done.result_files[0], extra_query={"raw": "true"}).text
    assert base64.b64decode(text).decode() == plain
    rows = list(csv.DictReader(io.StringIO(plain)))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [row["step"] for row in rows] == [str(i) for i in range(1, 9)]
    assert rows[0]["valid_loss"] == "" and float(rows[1]["valid_loss"]) > 0
    assert not (api.service.runs / walk.done.id).exists()  # rows are in it


def test_a_webhook_is_told_again_and_signed(walk: Walk) -> None:
    def told() -> list[tuple[dict[str, str], bytes]]:
        return [(h, body) for h, body in walk.hook.got if h["webhook-id"] == walk.hook.got[0][0]["webhook-id"]]

    wait(lambda: len(told()) >= 2, "the webhook")
    headers, body = told()[-1]
    event = walk.client.webhooks.unwrap(body, headers, secret=walk.secret)
    assert (event.type, event.data.id) == ("fine_tuning.job.succeeded", walk.done.id)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        walk.client.webhooks.unwrap(body + b" ", headers, secret=walk.secret)


def test_a_tuned_model_is_trained_further_and_deleted(api: Running, walk: Walk) -> None:
    client, name = walk.client, walk.done.fine_tuned_model
    again = client.fine_tuning.jobs.create(
        model=name, training_file=walk.files[0], hyperparameters={"n_epochs": 1}, extra_body=LORA
    )
    assert refused(lambda: client.models.delete(name))["code"] == "model_in_use"
    assert again.hyperparameters.to_dict() == {"n_epochs": 1, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    further = finished(client, again.id)
    chosen = further.hyperparameters  # "auto" has become what was taken
    assert chosen.n_epochs == 1 and 1 <= chosen.batch_size <= 32 and chosen.learning_rate_multiplier == 1
    assert row_of(api, again.id).recipe["train"]["batch_size"] == chosen.batch_size
    assert further.method.supervised.hyperparameters.to_dict() == chosen.to_dict()
    assert further.status == "succeeded" and further.fine_tuned_model.startswith("ft:tiny:default::"), further
    assert client.models.delete(name).to_dict()["dependents"] == {"jobs": [again.id]}
    assert not api.service.artifacts.path(f"models/{walk.done.id}/final").exists()


def test_figures_go_to_wandb_where_a_job_asks_for_it(walk: Walk, noted: Path) -> None:
    begun, *steps, end = read_jsonl(noted)
    assert (begun["project"], begun["name"], begun["tags"]) == ("colours", "first", ["a", "b"])
    assert begun["config"]["epochs"] == 4 and end == {"finish": 0}
    assert {step["step"] for step in steps} == set(range(1, 9)) and any("loss" in str(s["values"]) for s in steps)
    assert walk.done.integrations[0].wandb.project == "colours"


SYNC = """
import sys
from openai import OpenAI
from wandb.integration.openai.fine_tuning import WandbLogger
for lookup in ("_get_wandb_run", "_get_wandb_artifact"):  # of what W&B's own server has
    setattr(WandbLogger, lookup, classmethod(lambda *_: None))
client = OpenAI(base_url=sys.argv[1], api_key=sys.argv[2])
assert "completed successfully" in WandbLogger.sync(sys.argv[3], openai_client=client, mode="disabled")
print(WandbLogger._run.summary["fine_tuned_model"], WandbLogger._run.summary["status"])
"""


def test_wandbs_own_reader_of_openais_jobs(walk: Walk, api: Running, caplog: pytest.LogCaptureFixture) -> None:
    """`WandbLogger.sync`, as it is: the job, its figures and both files are fetched and understood."""
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"WANDB_MODE": "disabled"}
    words = [sys.executable, "-c", SYNC, f"{api.url}/v1", api.secret, walk.done.id]
    with caplog.at_level("INFO", "tunesmith.access"):
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == [walk.done.fine_tuned_model, "succeeded"]
    paths = [json.loads(r.getMessage())["path"] for r in caplog.records if r.name == "tunesmith.access"]
    read = [f"/v1/files/{id}/content" for id in (*walk.done.result_files, *walk.files)]
    assert paths == [f"/v1/fine_tuning/jobs/{walk.done.id}", *read]


def test_webhooks_tell_of_jobs_that_fail_and_that_are_cancelled(api: Running) -> None:
    client = api.client(role="admin", project=api.service.store.keys.create_project("told").id)
    every, some = Hook(refuses=0), Hook(refuses=0)
    client.post("/webhooks", cast_to=object, body={"url": every.url})
    one = client.post("/webhooks", cast_to=object, body={"url": some.url, "events": ["fine_tuning.job.cancelled"]})
    ask = {"model": "tiny", "training_file": api.upload(client=client)}
    failed = client.fine_tuning.jobs.create(**ask, extra_body={"resources": {"memory_gib": 0.01}})
    assert finished(client, failed.id).status == "failed"
    cancelled = client.fine_tuning.jobs.create(**ask)
    client.fine_tuning.jobs.cancel(cancelled.id)
    wait(lambda: len(every.got) >= 2 and some.got, "both webhooks")
    told = [json.loads(body) for _, body in every.got]
    assert {(t["type"], t["data"]["id"]) for t in told} == {
        ("fine_tuning.job.failed", failed.id),
        ("fine_tuning.job.cancelled", cancelled.id),
    }
    headers, body = some.got[0]
    event = client.webhooks.unwrap(body, headers, secret=one["secret"])
    assert (event.type, event.data.id, len(some.got)) == ("fine_tuning.job.cancelled", cancelled.id, 1)


def test_a_job_that_can_not_be_done_says_why(api: Running) -> None:
    client = api.client()
    long = chat(12)
    long[4]["messages"][0]["content"] = "word " * 3000
    jobs = {
        "invalid_training_file": client.fine_tuning.jobs.create(model="tiny", training_file=api.upload(long)),
        "insufficient_resources": client.fine_tuning.jobs.create(
            model="tiny", training_file=api.upload(), extra_body={"resources": {"memory_gib": 0.01}}
        ),
    }
    for code, job in jobs.items():
        done = finished(client, job.id)
        assert (done.status, done.error.code) == ("failed", code), done
        assert "/" not in done.error.message.replace("file-", "").split(" ")[0]
        last = events(client, job.id)[-1]
        assert last.level == "error" and last.message == done.error.message
        assert done.fine_tuned_model is None and done.finished_at


def test_a_failed_job_names_the_setting_and_no_path() -> None:
    named = child.told(ModelError("no layer fits 'nope'", where="train.adapter.targets"))
    assert (named["code"], named["param"]) == ("model_error", "train.adapter.targets")
    other = child.told(ModelError("is damaged", where="/models/base"))
    assert other["param"] == "model" and "/" not in other["message"]
    diverged = child.told(TrainingError("the loss is not a number"))
    assert (diverged["code"], diverged["param"]) == ("training_diverged", "hyperparameters")


@pytest.mark.proof
def test_pairs_and_proof(api: Running) -> None:
    client = api.client()
    dpo = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=api.upload(pairs(24)),
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
    )
    proved = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=api.upload(chat(40)),
        extra_body={"evaluate": {"max_new_tokens": 4}, "gate": ["goal.difference >= 2"]},
    )
    done = finished(client, dpo.id)
    assert done.status == "succeeded" and done.method.dpo.hyperparameters.beta == 0.2, done
    assert done.method.dpo.hyperparameters.n_epochs == 1
    assert finished(client, proved.id).error.code == "gate_held"
