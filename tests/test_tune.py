"""A search finds what is better, can be interrupted, and keeps the best as a recipe that runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe
from tunesmith.runs import read_json, read_jsonl

pytest.importorskip("optuna")


@pytest.fixture
def searched(recipe: dict[str, Any], tmp_path: Path) -> Path:
    recipe["train"] |= {"max_steps": 8, "epochs": 9, "validate_every": 2, "samples": 0}
    recipe["tune"] = {"space": {"train.learning_rate": [1e-7, 0.01]}, "trials": 3, "pruning": False}
    return write_recipe(tmp_path, recipe)


def test_the_better_setting_is_found_and_its_recipe_runs(tunesmith: Any, searched: Path, tmp_path: Path) -> None:
    said = tunesmith("tune", searched, "--space", "train.adapter.rank=2..4", "--json")
    assert said.code == 0, said.out
    found = said.json
    assert found["best"]["settings"]["train.learning_rate"] == 0.01 and len(found["trials"]) == 3
    folder = tmp_path / "runs/tiny-tune"
    run = folder / "trials" / found["best"]["trial"]
    assert found["best"]["value"] == read_json(run / "train/manifest.json")["summary"]["best_validation_loss"]
    assert found["best"]["value"] == min(t["value"] for t in found["trials"])
    assert tunesmith("train", folder / "best.yaml", "--json").code == 0
    adapter = "train/adapter/adapter_model.safetensors"
    assert (tmp_path / "runs/tiny-best" / adapter).read_bytes() == (run / adapter).read_bytes()
    again = tunesmith("tune", searched, "--space", "train.adapter.rank=2..4", "--json")
    assert again.json["trials"] == found["trials"]  # enough were tried: nothing is trained
    more = tunesmith("tune", searched, "--space", "train.adapter.rank=2..4", "--set", "tune.trials=4")
    assert more.code == 0 and "(best)" in more.out and "trial-0003" in more.out


def test_what_is_worse_than_the_median_is_pruned(tunesmith: Any, searched: Path, tmp_path: Path) -> None:
    """Two that learn, and then one that does not: it is stopped at its first validation."""
    sets = ["--set", "tune.pruning=true", "--set", "tune.try_first=2"]
    first = [*sets, "--set", "tune.trials=2", "--space", "train.learning_rate=0.009..0.01"]
    assert tunesmith("tune", searched, *first).code == 0
    said = tunesmith("tune", searched, *sets, "--space", "train.learning_rate=1.0e-9..5.0e-9", "--json")
    assert said.code == 0, said.out
    states = {trial["trial"]: trial["state"] for trial in said.json["trials"]}
    assert states == {"trial-0000": "complete", "trial-0001": "complete", "trial-0002": "pruned"}
    assert len(read_jsonl(tmp_path / "runs/tiny-tune/trials/trial-0002/metrics.jsonl")) == 2


def test_a_search_that_was_killed_goes_on_with_the_same_trial(tunesmith: Any, searched: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tunesmith", "tune", str(searched), "--runs", str(tmp_path / "runs")]
    long = [*command, "--set", "train.max_steps=150", "--set", "train.epochs=900", "--set", "tune.trials=1"]
    process = subprocess.Popen(long, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "runs/tiny-tune/trials/trial-0000/metrics.jsonl"
    deadline = time.time() + 120
    while len(read_jsonl(metrics)) < 20 and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run([*long, "--json"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    events = read_jsonl(tmp_path / "runs/tiny-tune/trials/trial-0000/events.jsonl")
    starts = [e["step"] for e in events if e["event"] == "train_started"]
    assert len(starts) == 2 and starts[0] == 0 and starts[1] > 0
    assert [line["step"] for line in read_jsonl(metrics)] == list(range(1, 151))


def test_several_workers_share_one_search(tunesmith: Any, searched: Path) -> None:
    said = tunesmith("tune", searched, "--set", "tune.workers=2", "--set", "tune.trials=4", "--json")
    assert said.code == 0, said.out
    assert len(said.json["trials"]) in (4, 5) and {t["state"] for t in said.json["trials"]} == {"complete"}


def test_nothing_to_search_and_settings_that_fail(tunesmith: Any, searched: Path) -> None:
    said = tunesmith("tune", searched, "--set", "tune.space={}")
    assert said.code == 2 and "--space train.learning_rate=" in said.err
    said = tunesmith("tune", searched, "--set", "data.split.validation=0")
    assert said.code == 2 and "data.split.validation" in said.err
    said = tunesmith("tune", searched, "--space", "train.adapter.rank=[4000]", "--set", "tune.trials=1")
    assert said.code == 2 and "no trial came through" in said.err and "train.adapter.rank" in said.err
    said = tunesmith("tune", searched, "--space", "train.learning_rate=2..1")
    assert said.code == 2 and "a range goes up" in said.err


def test_a_search_goes_on_with_what_it_began_with_alone(tunesmith: Any, searched: Path, tmp_path: Path) -> None:
    once = ("--set", "tune.trials=1")
    assert tunesmith("tune", searched, *once).code == 0
    for more, what in (
        (("--space", "train.learning_rate=[1e-7, 1e-3]"), "tune.space: train.learning_rate"),
        (("--space", "train.learning_rate=1e-7..1e-3"), "tune.space: train.learning_rate"),
        (("--set", "train.best_by=exact_match"), "train"),  # a higher one is better
        (("--set", "data.split.validation=9"), "data"),
    ):
        said = tunesmith("tune", searched, *once, *more, "--json")
        assert said.code == 2 and f"other settings of: {what};" in said.json["error"]["what"], said.out
    assert tunesmith("tune", searched, *once, "--json").json["best"]["trial"] == "trial-0000"
    said = tunesmith("tune", searched, "--space", "train.learning_rate=[", "--json")
    assert said.code == 2 and "is not YAML" in said.json["error"]["what"]


def test_the_best_recipe_runs_from_anywhere(
    tunesmith: Any, searched: Path, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With files of the user's own beside the recipe, and a start from another run."""
    (tmp_path / "checks.py").write_text("def long(answer, reference, row):\n    return len(answer)\n")
    (tmp_path / "answer.json").write_text('{"type": "object"}')
    assert tunesmith("train", searched, "--set", "name=first").code == 0
    recipe["goal"] = {"metric": "checks.py:long"}
    recipe["evaluate"]["json_schema"] = "answer.json"
    recipe["train"] |= {"start_from": "first", "max_steps": 1}
    path = write_recipe(tmp_path, recipe)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs = ("--runs", tmp_path / "runs")
    said = tunesmith("tune", path, "--set", "tune.trials=1", *runs, "--json")
    assert said.code == 0, said.out
    said = tunesmith("run", tmp_path / "runs/tiny-tune/best.yaml", *runs, "--json")
    assert said.code == 0 and said.json["scorecard"]["goal_metric"] == "long", said.out


@pytest.mark.long
def test_ray_tune_searches_too(tunesmith: Any, searched: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    said = tunesmith("tune", searched, "--set", "tune.engine=ray", "--set", "tune.trials=2", "--json")
    assert said.code == 0, said.out
    best, trials = said.json["best"], said.json["trials"]
    assert best["value"] == min(trial["value"] for trial in trials) and len(trials) == 2
    told = read_json(tmp_path / "runs/tiny-tune/trials" / best["trial"] / "train/manifest.json")["summary"]
    assert told["best_validation_loss"] == best["value"]
    folder = tmp_path / "runs/tiny-tune"
    assert tunesmith("train", folder / "best.yaml", "--json").code == 0
    again = read_json(tmp_path / "runs/tiny-best/train/manifest.json")["summary"]
    assert again["best_validation_loss"] == pytest.approx(best["value"], rel=1e-3)  # by another number of threads
    said = tunesmith("tune", searched, "--set", "tune.engine=ray", "--set", "tune.trials=2", "--json")
    assert said.code == 0 and said.json["best"] == best  # what was searched is not searched again
