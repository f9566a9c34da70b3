"""A run's folder: where everything lies, how it is written, and what proves that a stage is complete.

No other module builds a path inside a run. A stage's folder appears under its final name only when it is
whole, and its `manifest.json` is written last: where that file is, the stage is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError, RunError, nearest

STAGES = ("data", "train", "evaluate", "package")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
RECORDED = (
    "tunesmith",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "sacrebleu",
    "rouge-score",
    "nltk",
    "jiwer",
    "jsonschema",
    "lm-eval",
)


def runs_folder(given: str | Path | None = None) -> Path:
    """Where runs go: `--runs`, else TUNESMITH_RUNS, else ./runs."""
    return Path(given or os.environ.get("TUNESMITH_RUNS") or "runs")


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"can't be read ({error})", where=str(path), fix="Run the stage again.") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file; a line that a kill cut short is left out."""
    rows = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):  # a kill can cut a letter in two: bytes, until a line is whole
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
    return rows


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that takes `target`'s name, replacing what is there, once the block is through."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    replaced = target.with_name(f".{target.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.replace(replaced)
    temporary.replace(target)
    shutil.rmtree(replaced, ignore_errors=True)


def outputs_of(folder: Path, within: str = ".") -> dict[str, dict[str, Any]]:
    """Size in bytes and SHA-256 of every file of an artifact (or of one of its folders)."""
    files = sorted(p for p in (folder / within).rglob("*") if p.is_file() and p.name != "manifest.json")
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": hash_file(p)} for p in files}


def digest(manifest: dict[str, Any]) -> str:
    """One hash for an artifact's content: what a later stage names as its parent."""
    return hash_json({name: file["sha256"] for name, file in manifest["outputs"].items()})


@cache
def versions() -> dict[str, str]:
    """The versions of Python and of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for name in RECORDED:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def need_room(
    folder: Path, needed: int, what: str, fix: str = "Free some room, or choose another place with --runs."
) -> None:
    """Raise unless the disk under `folder` has `needed` bytes free."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{what} needs about {-(-needed // 2**20):,} MiB of disk and {free // 2**20:,} MiB are free",
            where=str(folder.resolve()),
            fix=fix,
        )


@dataclass(frozen=True)
class Run:
    """A run's folder and the names of what lies in it."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def scorecard(self) -> Path:
        return self.path / "scorecard.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def answers(self) -> Path:
        """What models were asked, as they answered it."""
        return self.path / "answers"

    @property
    def review(self) -> Path:
        """Sheets for people, and what they said."""
        return self.path / "review"

    @property
    def origin(self) -> Path:
        return self.path / "origin.json"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def tuned(self) -> Path:
        """What training made: PEFT's adapter, or a whole model where the base's own weights were trained."""
        model = self.stage("train") / "model"
        return model if model.is_dir() else self.stage("train") / "adapter"

    @property
    def model(self) -> Path:
        return self.stage("package") / "model"

    @property
    def checkpoints(self) -> Path:
        return self.stage("train") / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """Weights as they were at the ends of epochs."""
        return self.stage("train") / "snapshots"

    @property
    def findings(self) -> Path:
        """What was noticed while training, a line each."""
        return self.stage("train") / "findings.jsonl"

    @property
    def samples(self) -> Path:
        """Answers to a few validation rows, a line a row and validation."""
        return self.stage("train") / "samples.jsonl"

    def stage(self, name: str) -> Path:
        return self.path / name

    def manifest(self, stage: str | None = None) -> dict[str, Any] | None:
        """A stage's manifest, or the run's own; None where there is none yet."""
        path = (self.stage(stage) if stage else self.path) / "manifest.json"
        return read_json(path) if path.exists() else None

    def complete(self, stage: str, key: str | None = None) -> dict[str, Any] | None:
        """The manifest of a stage that is whole, made from what its parents are now, and with `key` if one is
        given; else None."""
        manifest = self.manifest(stage)
        if manifest is None or (key is not None and manifest.get("key") != key):
            return None
        for name, made_from in manifest["parents"].items():
            parent = self.complete(name)
            if parent is None or digest(parent) != made_from["digest"]:
                return None
        for name, file in manifest["outputs"].items():
            path = self.stage(stage) / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                return None
        return manifest

    @property
    def scores(self) -> dict[str, Any] | None:
        """The scorecard of what is trained now; None before its evaluation."""
        return read_json(self.stage("evaluate") / "scorecard.json") if self.complete("evaluate") else None

    def event(self, kind: str, **facts: Any) -> None:
        """Add a line to events.jsonl."""
        append_jsonl(self.path / "events.jsonl", {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "event": kind} | facts)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; a second one is refused at once."""
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                f"the folder can't be made ({error.strerror})",
                where=str(self.path),
                fix="Choose another place with --runs, TUNESMITH_RUNS or, for any two models, --out.",
            ) from error
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"run '{self.name}' is being worked on by another process",
                where=str(self.path),
                fix="Wait for it, or use another name (--set name=...) or, for any two models, another --out.",
            ) from None
        try:
            yield
        finally:
            lock.release()


_line = json.JSONEncoder(ensure_ascii=False)


def json_line(row: dict[str, Any]) -> str:
    return _line.encode(row) + "\n"


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Add one line, after ending a line that a kill may have cut short."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json_line(row).encode())


def get(name: str, runs: str | Path | None = None) -> Run:
    """An existing run, by name or path.

    Raises:
        RunError: there is none; names the runs that there are.
    """
    folder = runs_folder(runs)
    for path in (folder / name, Path(name)):
        if (path / "recipe.yaml").is_file() and (path / "origin.json").is_file():
            return Run(path)
    there = [run.name for run in every(folder)]
    raise RunError(
        f"no run is called '{name}'{nearest(name, there)}",
        where=str(folder),
        fix=f"There are: {', '.join(there)}." if there else "There are no runs here; make one: tunesmith run RECIPE",
    )


def told_apart(found: Sequence[Run]) -> dict[str, Run]:
    """Runs by name; those of one name, in several folders, by their paths.

    Raises:
        RunError: a run is there twice.
    """
    places, names = [run.path.resolve() for run in found], [run.name for run in found]
    twice = next((run for run, place in zip(found, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise RunError("is named twice", where=str(twice.path), fix="Name each run once.")
    return {run.name if names.count(run.name) == 1 else str(run.path): run for run in found}


def every(runs: str | Path | None = None) -> list[Run]:
    """All runs of a folder, newest last."""
    found = [Run(path.parent) for path in runs_folder(runs).glob("*/origin.json")]
    return sorted(found, key=lambda run: run.origin.stat().st_mtime)
