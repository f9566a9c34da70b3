"""What goes wrong with machines: workers, the API and the database killed, disks full. Nothing is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.service import PATIENCE, chat, events, finished, free_port, jsonl, running, settings, team, wait
from tests.test_service_jobs import files_of, row_of
from tunesmith.jobs.artifacts import Artifacts, TooLarge

LONG_JOB = {"model": "tiny", "seed": 5, "hyperparameters": {"n_epochs": 25, "batch_size": 4}}  # of 64 rows
STEPS = list(range(1, 401))


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def stepping(client: Any, job: str, least: int = 1) -> Any:
    """Wait until the job has told of some steps."""

    def told() -> bool:
        steps = [e for e in client.fine_tuning.jobs.list_events(job, limit=3).data if e.type == "metrics"]
        return any(e.data["step"] >= least for e in steps)

    return wait(told, "a step")


def test_a_full_disk_keeps_nothing_and_says_so(tmp_path: Path) -> None:
    place = Artifacts(str(tmp_path / "artifacts"), tmp_path / "cache")

    class Full(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            found = super().read(4)
            if not found:
                raise OSError(errno.ENOSPC, "No space left on device")
            return found

    with pytest.raises(OSError):
        place.put("files/a", Full(b"12345678"))
    with pytest.raises(TooLarge):
        place.put("files/b", io.BytesIO(b"12345678"), most=7)
    assert [p for p in (tmp_path / "artifacts").rglob("*") if p.is_file()] == []
    for key in ("../x", "/etc/passwd", "files/../../x", "files//x", "", ".hidden", "files/.x"):
        with pytest.raises(ValueError, match="not an artifact's key"):
            place.put(key, io.BytesIO(b"x"))


def test_a_server_whose_disk_is_full_answers_and_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """Files beyond a size can't be written in its process, which is what a full disk looks like."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path.cwd())!r})
from pathlib import Path
from tests.service import running, settings
with running(settings(Path({str(tmp_path)!r}), Path({str(tiny_model)!r}))) as found:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    print(found.url, found.secret, flush=True)
    sys.stdin.read()
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdin
    try:
        url, secret = server.stdout.readline().split()
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=secret, max_retries=0, timeout=PATIENCE)
        with pytest.raises(openai.InternalServerError) as told:
            client.files.create(file=b"0" * 3_000_000, purpose="user_data")
        assert "Traceback" not in told.value.message and set(told.value.response.json()["error"]) >= {"message", "code"}
        assert list(client.files.list()) == []
        assert client.files.create(file=b"0" * 1000, purpose="user_data").bytes == 1000
    finally:
        server.stdin.close()
        server.wait(timeout=PATIENCE)


@pytest.mark.proof
def test_a_job_that_was_killed_and_paused_ends_with_the_bytes_of_one_that_was_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    with running(settings(tmp_path, tiny_model, lease=3.0)) as api:
        client = api.client()
        ask = LONG_JOB | {"training_file": api.upload(chat(64))}
        with team(api) as crew:
            whole = client.fine_tuning.jobs.create(**ask)
            assert finished(client, whole.id).status == "succeeded"
            job = client.fine_tuning.jobs.create(**ask)
            for least in (60, 130):  # twice: each time the worker, and its job's process with it
                stepping(client, job.id, least)
                worker = crew.processes[0].pid
                mine = children(worker)
                os.kill(worker, signal.SIGKILL)
                wait(lambda mine=mine: not any(map(_alive, mine)), "the child's end")
            stepping(client, job.id, 200)
            assert client.fine_tuning.jobs.pause(job.id).status == "paused"
            wait(lambda: row_of(api, job.id).worker is None, "the end of the paused job's process")
            assert 200 <= client.fine_tuning.jobs.checkpoints.list(job.id).data[0].step_number < 400
            assert client.fine_tuning.jobs.resume(job.id).status == "queued"
            done = finished(client, job.id)
        assert done.status == "succeeded", done
        told = [e.message for e in events(client, job.id)]
        assert sum("worker was lost" in m for m in told) == 2
        assert [e.data["step"] for e in events(client, job.id) if e.type == "metrics"] == STEPS
        assert (api.service.logs / f"{job.id}.log").read_text().count("Going on from step") == 3
        final = client.fine_tuning.jobs.retrieve(whole.id).fine_tuned_model
        assert files_of(api, done.fine_tuned_model) == files_of(api, final)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.long
def test_two_jobs_and_both_workers_killed_at_once(tiny_model: Path, tmp_path: Path) -> None:
    with running(settings(tmp_path, tiny_model, lease=3.0, workers=2, cores=2)) as api:
        client = api.client()
        file = api.upload(chat(64))
        jobs = [
            client.fine_tuning.jobs.create(**LONG_JOB | {"training_file": file, "seed": seed}).id for seed in (1, 2)
        ]
        with team(api, 2) as crew:
            for job in jobs:
                stepping(client, job, 60)
            for process in crew.processes:
                os.kill(process.pid, signal.SIGKILL)
            assert [finished(client, job).status for job in jobs] == ["succeeded"] * 2


ELSEWHERE = """
from fsspec.implementations.local import LocalFileSystem
class Elsewhere(LocalFileSystem):
    protocol = "elsewhere"
    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("elsewhere://").rstrip("/")
"""


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a place for artifacts that is no folder of this machine, as far as anybody can tell."""
    import fsspec

    made = tmp_path / "packages"
    (made / "elsewhere-1.0.dist-info").mkdir(parents=True)
    (made / "elsewhere.py").write_text(ELSEWHERE)
    (made / "elsewhere-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (made / "elsewhere-1.0.dist-info/entry_points.txt").write_text("[fsspec.specs]\nelsewhere=elsewhere.Elsewhere\n")
    monkeypatch.syspath_prepend(made)
    monkeypatch.setenv("PYTHONPATH", f"{made}:{os.environ.get('PYTHONPATH', '')}")
    fsspec.register_implementation("elsewhere", "elsewhere.Elsewhere", clobber=True)
    return f"elsewhere://{tmp_path}/shared"


def test_artifacts_that_lie_elsewhere(elsewhere: str, tmp_path: Path) -> None:
    place = Artifacts(elsewhere, tmp_path / "cache")
    assert not place.local
    assert place.put("files/a", io.BytesIO(b"abc"))[0] == 3 and place.path("files/a").read_bytes() == b"abc"
    made = tmp_path / "folder"
    (made / "inner").mkdir(parents=True)
    (made / "inner/x").write_text("x")
    (made / "y").write_text("y")
    place.put_folder("models/m", made)
    fetched = place.path("models/m")
    assert {p.relative_to(fetched).as_posix() for p in fetched.rglob("*") if p.is_file()} == {"inner/x", "y"}
    place.delete("models/m")
    place.delete("files/a")
    place.delete("files/none")
    assert not [p for folder in ("shared", "cache") for p in (tmp_path / folder).rglob("*") if p.is_file()]


@pytest.mark.proof
def test_the_database_restarts_under_a_running_job(postgres: Any, tiny_model: Path, tmp_path: Path) -> None:
    with running(settings(tmp_path, tiny_model, lease=5.0, database=postgres.database())) as api:
        client = openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.secret, max_retries=10, timeout=PATIENCE)
        ask = LONG_JOB | {"training_file": api.upload(chat(64)), "metadata": {"a": "b"}}
        with team(api):
            job = client.fine_tuning.jobs.create(**ask)
            stepping(client, job.id, 20)
            assert [j.id for j in client.fine_tuning.jobs.list(extra_query={"metadata[a]": "b"})] == [job.id]
            assert list(client.fine_tuning.jobs.list(extra_query={"metadata": "null"})) == []
            postgres.stop()
            once = openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.secret, max_retries=0)
            with pytest.raises(openai.InternalServerError) as told:
                once.fine_tuning.jobs.retrieve(job.id)
            assert (told.value.status_code, told.value.code) == (503, "database_away")
            assert told.value.response.headers["retry-after"]
            time.sleep(2)
            postgres.start()
            assert finished(client, job.id).status == "succeeded"
        assert [e.data["step"] for e in events(client, job.id) if e.type == "metrics"] == STEPS


def launched(home: Path, model: Path, port: int, **limits: Any) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`tunesmith up`, once it listens."""
    words = ["up", "--json", "--home", str(home), "--port", str(port), "--model", f"tiny={model}", "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        **limits,
    )
    assert process.stdout
    return process, json.loads(process.stdout.readline() or "{}")


@pytest.mark.proof
def test_the_whole_service_is_killed_and_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """One command, a job, kill -9 in the middle, the same command again: the job is paused, and its snapshot answers;
    it ends, and its model and checkpoints answer."""
    port = free_port()
    process, told = launched(tmp_path / "home", tiny_model, port)
    try:
        assert told["url"] == f"http://127.0.0.1:{port}" and told["admin_key"].startswith("sk-")
        client = openai.OpenAI(
            base_url=f"{told['url']}/v1", api_key=told["admin_key"], max_retries=20, timeout=PATIENCE
        )
        file = client.files.create(file=jsonl(chat(64)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(**LONG_JOB | {"training_file": file})
        stepping(client, job.id, 60)
        process.kill()
        process.wait()
        process, told = launched(tmp_path / "home", tiny_model, port)
        assert "admin_key" not in told
        asked = [{"role": "user", "content": "Item 3 is red. What colour is it?"}]

        def answers(name: str) -> bool:
            made = client.chat.completions.create(model=name, messages=asked, max_tokens=4)
            return bool(made.choices[0].message.content)

        steps = [e.data["step"] for e in events(client, job.id) if e.type == "metrics"]
        stepping(client, job.id, max(steps) + 1)  # it goes on
        assert "Going on from step" in (tmp_path / f"home/logs/{job.id}.log").read_text()
        client.fine_tuning.jobs.pause(job.id)
        wait(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data, "the paused job's snapshot")
        snapshot = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
        assert 0 < snapshot.step_number < 400 and answers(snapshot.fine_tuned_model_checkpoint)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "paused"
        client.fine_tuning.jobs.resume(job.id)
        done = finished(client, job.id)
        assert done.status == "succeeded", done
        marks = client.fine_tuning.jobs.checkpoints.list(job.id).data
        assert all(map(answers, (done.fine_tuned_model, marks[0].fine_tuned_model_checkpoint)))
        assert {done.fine_tuned_model, "tiny"} <= {m.id for m in client.models.list()}
        client.models.delete(done.fine_tuned_model)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=done.fine_tuned_model, messages=[{"role": "user", "content": "x"}])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE) == 0


@pytest.mark.proof
def test_the_example_goes_all_the_way(tiny_model: Path) -> None:
    settings = {"EXAMPLE_MODEL": str(tiny_model), "EXAMPLE_ROWS": "24", "EXAMPLE_PORT": str(free_port())}
    example = Path(__file__).parents[1] / "examples/openai_client.py"
    done = subprocess.run([sys.executable, example], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        "The job has successfully completed" in done.stdout
        and "ft:smollm2-135m-instruct:default:triage:" in done.stdout
    )


@pytest.mark.proof
def test_machines_that_share_a_database_and_a_place_for_artifacts(
    elsewhere: str, postgres: Any, tiny_model: Path, tmp_path: Path
) -> None:
    """`--role api` and twice `--role worker`, each with a folder of its own, as on three machines. The one that trains
    is lost with all that runs on it; the other goes on, and the model answers where the API is."""
    import psutil

    port, machines = free_port(), {}
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"service: {{models: {{tiny: {tiny_model}}}, lease: 3, cores: 1}}")

    def start(name: str, role: str, lines: int, *more: str) -> list[str]:
        words = ["up", str(settings), "--role", role, "--home", str(tmp_path / name), "--artifacts", elsewhere]
        command = [sys.executable, "-u", "-m", "tunesmith", *words, "--database", database, *more]
        with (tmp_path / f"{name}.log").open("w") as log:
            machine = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        machines[name] = machine
        assert machine.stdout
        return [machine.stdout.readline() for _ in range(lines)]

    database, url = postgres.database(), f"http://127.0.0.1:{port}"
    try:
        said = start("api", "api", 2, "--port", str(port))
        assert said[0] == f"Tunesmith answers at {url}  (OpenAI's clients: base_url={url}/v1)\n"
        key = said[1].removeprefix("An admin's key, shown this once: ").strip()
        for name in ("one", "two"):
            assert start(name, "worker", 1) == ["1 workers wait for jobs\n"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=5, timeout=PATIENCE)
        file = client.files.create(file=jsonl(chat(64)), purpose="fine-tune").id
        job = client.fine_tuning.jobs.create(**LONG_JOB | {"training_file": file})
        stepping(client, job.id, 150)
        lost = next(name for name in ("one", "two") if (tmp_path / name / "runs" / job.id).exists())
        other = {"one": "two", "two": "one"}[lost]
        machine = machines.pop(lost)
        with machine:
            for process in [psutil.Process(machine.pid), *psutil.Process(machine.pid).children(recursive=True)]:
                process.kill()
        done = finished(client, job.id)
        assert done.status == "succeeded", done
        assert [e.data["step"] for e in events(client, job.id) if e.type == "metrics"] == STEPS
        assert "Going on from step" in (tmp_path / other / f"logs/{job.id}.log").read_text()
        assert not (tmp_path / other / "runs" / job.id).exists()
        assert not list((tmp_path / "api").rglob("checkpoint*"))  # nothing was trained there
        messages: Any = [{"role": "user", "content": "Item 3 is red. What colour is it?"}]
        made = client.chat.completions.create(model=done.fine_tuned_model, messages=messages, max_tokens=4)
        assert made.choices[0].message.content
    finally:
        for machine in machines.values():
            machine.send_signal(signal.SIGTERM)
        ended = {name: machine.wait(timeout=PATIENCE) for name, machine in machines.items()}
    assert set(ended.values()) == {0}, ended
