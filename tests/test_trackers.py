"""Every tracker holds what metrics.jsonl holds, read back by its own library; none can end a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from tests.conftest import write_recipe
from tunesmith.runs import read_jsonl


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_jsonl(run / "metrics.jsonl")]


@pytest.fixture
def trained(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> Any:
    def train(*trackers: Any) -> Path:
        recipe["train"] |= {"max_steps": 3, "trackers": list(trackers)}
        said = tunesmith("train", write_recipe(tmp_path, recipe))
        assert said.code == 0 and "failed" not in said.err, said.err
        return tmp_path / "runs/tiny"

    return train


def test_tensorboard(trained: Any) -> None:
    pytest.importorskip("tensorboard")
    run = trained("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses(run))
    assert len(events.Scalars("validation_loss")) == 1
    (told,) = events.Tensors("samples/text_summary")
    text = told.tensor_proto.string_val[0].decode()
    answers = read_jsonl(run / "train/samples.jsonl")
    assert told.step == 3 and len(answers) == 3
    for answer in answers:
        assert all(f"{name}: {answer[name]}" in text for name in ("row", "asked", "reference", "answer"))


def test_mlflow(trained: Any) -> None:
    pytest.importorskip("mlflow")
    run = trained({"kind": "mlflow", "experiment": "mine"})
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [m.value for m in history] == pytest.approx(losses(run)) and [m.step for m in history] == [1, 2, 3]
    assert found.info.status == "FINISHED" and found.data.params["adapter.rank"] == "4"


def test_dvclive(trained: Any) -> None:
    pytest.importorskip("dvclive")
    run = trained("dvclive")
    lines = (run / "dvclive/plots/metrics/loss.tsv").read_text().splitlines()
    assert [float(line.split("\t")[1]) for line in lines[1:]] == pytest.approx(losses(run))
    assert json.loads((run / "dvclive/metrics.json").read_text())["step"] == 3


def test_wandb_offline(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    run = trained({"kind": "wandb", "project": "x", "mode": "offline"})
    from wandb.proto import wandb_internal_pb2

    (file,) = (run / "wandb").glob("offline-run-*/*.wandb")
    found = []
    for data in leveldb_records(file.read_bytes()[7:]):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        found += [json.loads(items["loss"])] if "loss" in items else []
    assert found == pytest.approx(losses(run))


def leveldb_records(log: bytes) -> list[bytes]:
    """The records of a LevelDB log, which is what wandb writes (after seven bytes of its own, part of the first block):
    blocks of 32 KiB, each record's pieces with a checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last)."""
    found, part, place = [], b"", 0
    while place + 7 <= len(log):
        room = 32768 - (place + 7) % 32768
        if room < 7:
            place += room
            continue
        size, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        part += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):
            found.append(part)
            part = b""
    return found


@pytest.mark.long  # its client looks for a network for minutes
def test_clearml_offline(recipe: dict[str, Any], tmp_path: Path) -> None:
    """In a process of its own: the client's offline mode is the process's."""
    pytest.importorskip("clearml")
    recipe["train"] |= {"max_steps": 3, "trackers": [{"kind": "clearml", "mode": "offline"}]}
    path = write_recipe(tmp_path, recipe)
    environment = os.environ | {"CLEARML_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tunesmith", "train", str(path), "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "failed" not in done.stderr, done.stderr
    (session,) = (tmp_path / "cache").rglob("offline*.zip")
    with zipfile.ZipFile(session) as kept:
        lines = kept.read("metrics.jsonl").decode().splitlines()
    events = [event for line in lines for event in json.loads(line)]
    told = sorted((e["iter"], e["value"]) for e in events if e.get("metric") == "loss" and "value" in e)
    assert [value for _, value in told] == pytest.approx(losses(tmp_path / "runs/tiny"))


def test_a_tracker_that_fails_is_left_out_with_one_warning(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith import plugins
    from tunesmith.train.trackers import TrackerSection

    class Failing(TrackerSection):
        package: ClassVar[str] = "json"
        kind: Literal["failing"] = "failing"
        at_start: bool = False

        def open(self, *given: Any) -> Any:
            if self.at_start:
                raise SystemExit("not logged in")
            return self

        def numbers(self, step: int, values: dict[str, float]) -> None:
            raise ConnectionError("no network")

    monkeypatch.setattr(sys.modules[__name__], "Failing", Failing, raising=False)
    monkeypatch.setitem(plugins.BUILT_IN["tracker"], "failing", f"{__name__}:Failing")
    plugins.known.cache_clear()
    recipe["train"] |= {"trackers": ["failing", {"kind": "failing", "at_start": True}]}
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    plugins.known.cache_clear()
    assert said.code == 0
    assert said.err.count("no network") == 1 and said.err.count("not logged in") == 1
    assert len(losses(tmp_path / "runs/tiny")) == 6


def test_a_tracker_that_is_not_installed_names_the_extra(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.train.trackers.wandb import Wandb

    monkeypatch.setattr(Wandb, "package", "wandb_that_is_not_there")
    recipe["train"]["trackers"] = ["wandb"]
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "pip install 'tunesmith[wandb]'" in said.err
    assert "weights in" not in said.err  # before a model is loaded


def test_turning_a_tracker_on_trains_nothing_anew_and_typos_are_told(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path).code == 0
    said = tunesmith("train", path, "--set", "train.trackers=[tensorboard]")
    assert said.code == 0 and "train: up to date" in said.err
    said = tunesmith("train", path, "--set", "train.trackers=[tensorbord]")
    assert said.code == 2 and "did you mean 'tensorboard'" in said.err
    said = tunesmith("train", path, "--set", "train.trackers=[{kind: wandb, projct: x}]")
    assert said.code == 2 and "unknown key; did you mean 'project'" in said.err
