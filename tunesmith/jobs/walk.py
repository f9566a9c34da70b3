"""One job on one worker: its process started, watched, told when to stop, and what it made put where it belongs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

from tunesmith.jobs import board, gpus, sweep, watch
from tunesmith.jobs.artifacts import file_key, model_key, run_key
from tunesmith.jobs.child import BUSY
from tunesmith.jobs.queue import Queue
from tunesmith.jobs.recipe import KEPT, recipe_of, stages, whole
from tunesmith.jobs.results import result_csv
from tunesmith.jobs.service import Service
from tunesmith.models.arrays import is_plain_lora
from tunesmith.runs import Run
from tunesmith.store import ids
from tunesmith.store.tables import File, Job

POLL = 0.25
STOPPING = 300.0  # seconds that a process has to finish its step and save
GIB = 2**30
Result = TypeVar("Result")


class Walk:
    """An attempt at a job, by the worker that holds it.

    Args:
        cores: that a new job gets, if it asks for no fewer. One that goes on keeps what it began with, since sums in
            another number of threads may differ in the last digit.
        asked: what became of the job: its status, or None once it is another worker's; "leave" where the worker ends.
    """

    def __init__(self, service: Service, held: Queue, job: Job, cores: int, asked: Callable[[], str | None]) -> None:
        self.service, self.queue, self.job, self.asked = service, held, job, asked
        self.cores = int(job.needs.get("cores") or min(cores, job.needs.get("asked_cores") or cores))
        self.run = Run(service.runs / job.id)
        self.metrics = watch.Metrics(self.run, job.progress)
        self.answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self.saved = watch.newest_checkpoint(self.run)
        self.known = job.seen  # the last step whose snapshot became a model

    def __call__(self) -> None:
        """Work until it is done, or until somebody else wants it otherwise."""
        self.fetch()
        ended = self.attempt()
        if ended["kind"] == "planned":  # it has devices now, of which a process must know from its start
            ended = self.attempt()
        if ended["kind"] not in ("lost", "cancelled", "left"):
            self.tick()
        self.settle(ended)

    def attempt(self) -> dict[str, Any]:
        """A process, from its start to its end; what it said."""
        process = self.begin()
        try:
            return self.follow(process)
        except BaseException:
            process.kill()
            raise
        finally:
            _close(process)

    def fetch(self) -> None:
        """The run's folder, where another machine began it."""
        job = self.job
        if job.snapshot and job.machine != self.queue.machine:
            shutil.rmtree(self.run.path, ignore_errors=True)
            self.service.runs.mkdir(parents=True, exist_ok=True)
            with self.service.artifacts.open(job.snapshot) as file, tarfile.open(fileobj=file, mode="r|") as tar:
                tar.extractall(self.service.runs, filter="data")
        self.saved = watch.newest_checkpoint(self.run)

    def recipe(self) -> dict[str, Any]:
        """The job's recipe, with this machine's paths."""
        job, service = self.job, self.service
        files = (
            str(service.file(job.training_file)),
            str(service.file(job.validation_file)) if job.validation_file else None,
        )
        start = None
        if job.model.startswith("ft:"):
            found = service.model(job.model)
            if found is None:
                raise FileNotFoundError(job.model)
            start = str(service.artifacts.path(found.artifact))
        base = service.settings.models[board.base_of(job)]
        made = recipe_of(job.id, base, job.seed, job.method, job.settings, files, start, job.integrations)
        if job.recipe is not None:  # with numbers for every "auto"
            made["train"] = {**job.recipe["train"], **({"start_from": start} if start else {})}
        return made

    def begin(self) -> subprocess.Popen[str]:
        self.service.logs.mkdir(parents=True, exist_ok=True)
        temporary = self.run.path / ".tmp"  # what a killed process leaves of the rows goes with the run's folder
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        keys = self.recipe()
        with (self.service.logs / f"{self.job.id}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.jobs.child", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                # Sets are then written in the same order by every process, so that equal models are equal files.
                env=os.environ
                | {"OMP_NUM_THREADS": str(self.cores), "PYTHONHASHSEED": "0", "TMPDIR": str(temporary)}
                | gpus.visible(self.job.needs),
            )
        kind = self.job.method["type"]
        multiplier = self.job.method[kind]["hyperparameters"]["learning_rate_multiplier"]
        order = {
            "plan": self.job.recipe is None,
            "recipe": keys,
            "runs": str(self.service.runs),
            "stages": list(stages(keys)),
            "multiplier": 1.0 if multiplier == "auto" else multiplier,
        }
        _send(process, json.dumps(order))
        assert process.stdout
        threading.Thread(target=self._listen, args=(process.stdout,), daemon=True).start()
        return process

    def _listen(self, answers: IO[str]) -> None:
        for line in answers:
            with contextlib.suppress(ValueError):
                self.answers.put(json.loads(line))
        self.answers.put(None)

    def follow(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        """Watch the process to its end; what it said last."""
        deadline, last = None, None
        while True:
            try:
                said = self.answers.get(timeout=POLL)
                if said is None:
                    code = process.wait()
                    return last or {"kind": "died", "code": code}
                if last is not None:  # the first verdict stands
                    continue
                if said["kind"] != "planned":
                    last = said
                elif not self.planned(said):
                    process.kill()
                    last = {"kind": "left"}
                elif self.job.needs.get("devices"):
                    last = said
                    _hang_up(process)
                else:
                    _send(process, "go")
            except queue.Empty:
                pass
            status = self.asked()
            if status is None or status == "cancelled":
                process.kill()
                last = last or {"kind": "lost" if status is None else "cancelled"}
            elif status not in ("running", "validating_files") and last is None:
                if deadline is None:
                    deadline = time.monotonic() + STOPPING
                    process.terminate()
                elif time.monotonic() > deadline:
                    process.kill()
            if status is not None:
                self.tick()

    def planned(self, plan: dict[str, Any]) -> bool:
        """Hold the plan against what there is; whether to go on."""
        job = self.job
        most = min(self.queue.capacity.memory, round((job.needs.get("asked_memory_gib") or 1e9) * GIB))
        if plan["memory"] > most:
            advice = "".join(f" {change}." for change in plan["advice"][:1])
            self.fail(
                "insufficient_resources",
                f"The job needs about {plan['memory'] / GIB:.1f} GiB of memory and may take {most / GIB:.1f}.{advice}",
            )
            return False
        needs = dict(job.needs) | {key: plan[key] for key in ("memory", "steps", "seconds")} | {"cores": self.cores}
        needs["gpus"] = min(self.queue.capacity.gpus, job.needs.get("asked_gpus", 1))
        if left_out := plan["counts"]["rejected"] + sum(plan["counts"]["removed"].values()):
            needs["left_out"] = left_out
        kind, train = job.method["type"], plan["recipe"]["train"]
        numbers = dict(job.method[kind]["hyperparameters"])
        epochs = train["epochs"]
        numbers |= {"n_epochs": int(epochs) if epochs == int(epochs) else epochs, "batch_size": train["batch_size"]}
        numbers["learning_rate_multiplier"] = (
            1.0 if numbers["learning_rate_multiplier"] == "auto" else numbers["learning_rate_multiplier"]
        )
        if "beta" in numbers:
            numbers["beta"] = plan["beta"] if plan["beta"] is not None else 0.1
        begun = patiently(lambda: self.queue.planned(job.id, numbers, needs, {"train": train}))
        job.needs, job.recipe = begun or needs, {"train": train}
        return begun is not None

    def tick(self) -> None:
        """Tell of new steps and snapshots, and keep the run's folder for other machines."""
        ready = watch.snapshots(self.run)
        lines = list(self.metrics.new())
        if lines:
            patiently(lambda: self._tell(lines))
        for step, path in ready.items():
            if step > self.known:
                self._keep(step, path)
        newest = watch.newest_checkpoint(self.run)
        if newest and newest != self.saved and self.service.several:
            self._save(newest)

    def _tell(self, lines: list[dict[str, Any]]) -> None:
        total = self.job.needs.get("steps", lines[-1]["step"])
        with self.service.store.write() as session:
            job = self.queue.held(session, self.job.id)
            for line in lines:
                if job is not None:
                    board.step(session, job, line, total, line["epoch"] == int(line["epoch"]) or line["step"] == total)

    def mine(self) -> Job | None:
        """The job as it is now, while it is this worker's and not over."""

        def read() -> Job | None:
            with self.service.store.read() as session:
                job = self.queue.held(session, self.job.id)
                return job if job is not None and job.status not in board.FINAL else None

        return patiently(read)

    def _keep(self, step: int, path: Path) -> None:
        """Make a snapshot a model, once."""
        job, key = self.mine(), model_key(self.job.id, step)
        if job is None or job.seen >= step:
            self.known = step
            return
        line = next((line for line in watch.lines_of(self.run) if line["step"] == step), None)
        try:
            self.service.artifacts.put_folder(key, path)
        except (FileNotFoundError, shutil.Error):  # a newer one takes its place; if not, the next look has it
            return
        metrics = board.metrics_of(line) if line else {}
        held = self.job.settings.get("gate") not in (None, False)

        def note() -> list[str]:
            with self.service.store.write() as session:
                job = self.queue.held(session, self.job.id)
                if job is None:
                    return []
                if job.status in board.FINAL:
                    return [key]
                return board.checkpoint(session, job, step, metrics, key, KEPT, held)

        self.service.forget(*patiently(note))
        self.known = step

    def _save(self, newest: str) -> None:
        """Keep the run's folder as an artifact, whole or not at all."""
        if self.mine() is None:
            return
        with tempfile_near(self.service.runs) as file:
            try:
                with tarfile.open(fileobj=file, mode="w") as tar:
                    tar.add(self.run.path, self.run.name, filter=lambda m: None if "/." in m.name else m)
            except FileNotFoundError:
                return  # it moved on while it was read; the next look has it
            file.seek(0)
            if watch.newest_checkpoint(self.run) != newest or self.mine() is None:
                return
            key = run_key(self.job.id)
            self.service.artifacts.put(key, file)

        def note() -> bool:
            with self.service.store.write() as session:
                job = self.queue.held(session, self.job.id)
                if job is not None:
                    job.snapshot, job.machine = key, self.queue.machine
                return job is not None and job.status in board.FINAL

        if patiently(note):
            self.service.forget(key)
        self.saved = newest

    def settle(self, ended: dict[str, Any]) -> None:
        """What becomes of the job."""
        kind = ended["kind"]
        status = self.asked()
        if kind == "done":
            self.finish()
        elif kind == "error":
            self.fail(ended["code"], ended["message"], ended["param"])
        elif kind == "died" and status in ("running", "validating_files"):
            patiently(lambda: self.queue.lost(self.job.id, f"its process ended with code {ended['code']}"))
        elif kind in ("stopped", "died", BUSY):
            patiently(lambda: self.queue.release(self.job.id, again=True))
        elif kind in ("cancelled", "left"):
            patiently(lambda: self.queue.release(self.job.id))
        if "cancelled" in (kind, status):
            self.clear()
        if kind == BUSY:
            time.sleep(min(self.queue.lease, 5.0))

    def finish(self) -> None:
        """Put the model and the results where they belong, and tell."""
        service, job = self.service, self.job
        if self.mine() is None:
            patiently(lambda: self.queue.release(job.id))
            return
        gate = (self.run.scores or {}).get("gate") or {}
        if gate.get("enforced") and gate["decision"] == "hold":
            broken = "; ".join(f"{c['condition']} ({c['why']})" for c in gate["conditions"] if c["state"] == "broken")
            self.fail("gate_held", f"The model is trained, and held by the gate: {broken}.")
            return
        alone, key = whole(job.settings), model_key(job.id)
        made = self.run.model if alone else self.run.tuned
        if not alone and not is_plain_lora(made):
            self.fail("model_error", "What was trained is no plain LoRA, so it can't be served beside others.")
            return
        service.artifacts.put_folder(key, made)
        lines = watch.lines_of(self.run)
        results = [self._result("step_metrics.csv", result_csv(lines))]
        if self.run.scores:
            results.append(self._result("scorecard.json", json.dumps(self.run.scores, indent=2).encode()))

        def note() -> str:
            with service.store.write() as session:
                found = self.queue.held(session, job.id)
                if found is None:
                    return "lost"
                found.worker = found.lease_until = None
                if found.status in board.FINAL:
                    return "over"
                session.add_all(results)
                tokens = sum(line["tokens"] for line in lines)
                board.succeed(session, found, key, alone, tokens, [r.id for r in results])
                return "made"

        became = patiently(note)
        if became != "made":
            service.forget(*(file_key(r.id) for r in results))
        if became != "lost":  # else it is another worker's, which makes the same model
            self.clear()

    def _result(self, name: str, content: bytes) -> File:
        id = ids.new("file-")
        size, hash = self.service.artifacts.put(file_key(id), io.BytesIO(content))
        return File(
            id=id,
            project=self.job.project,
            key=self.job.key,
            filename=name,
            purpose="fine-tune-results",
            bytes=size,
            sha256=hash,
            status="processed",
            created_at=int(time.time()),
        )

    def fail(self, code: str, message: str, param: str | None = None) -> None:
        def note() -> bool:
            with self.service.store.write() as session:
                job = self.queue.held(session, self.job.id)
                if job is None:
                    return False
                if job.status not in board.FINAL:
                    board.fail(session, job, code, message, param)
                job.worker = job.lease_until = None
                return True

        if patiently(note):
            self.clear()

    def clear(self) -> None:
        """Remove what a job that is over leaves: its run's folder, in which rows are, and models that nobody knows."""
        shutil.rmtree(self.run.path, ignore_errors=True)
        self.service.forget(run_key(self.job.id))
        sweep.models(self.service, self.job.id)


def patiently(what: Callable[[], Result], seconds: float = 600.0) -> Result:
    """Do something in the database, again and again while that can't be reached."""
    from sqlalchemy.exc import DBAPIError, OperationalError

    end, wait = time.monotonic() + seconds, 0.2
    while True:
        try:
            return what()
        except (OperationalError, DBAPIError) as error:
            if time.monotonic() > end or not (isinstance(error, OperationalError) or error.connection_invalidated):
                raise
            time.sleep(wait)
            wait = min(wait * 2, 5.0)


def tempfile_near(folder: Any) -> Any:
    import tempfile

    return tempfile.TemporaryFile(dir=folder)


def _send(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    with contextlib.suppress(BrokenPipeError):  # it has ended, which is told elsewhere
        process.stdin.write(line + "\n")
        process.stdin.flush()


def _hang_up(process: subprocess.Popen[str]) -> None:
    """Send nothing more."""
    assert process.stdin
    with contextlib.suppress(BrokenPipeError, OSError):
        process.stdin.close()


def _close(process: subprocess.Popen[str]) -> None:
    _hang_up(process)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
