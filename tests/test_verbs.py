"""What the verbs that only look tell is what running finds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import tunesmith as ts
from tests.conftest import write_recipe


def test_plan_foretells_what_training_does(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    plan = tunesmith("plan", path, "--json").json
    assert not (tmp_path / "runs").exists()
    told = tunesmith("train", path, "--json").json["train"]
    assert plan["steps"] == told["steps"] == 6
    assert plan["trained_parameters"] == told["parameters"]["trained"]
    assert plan["parameters"] == told["parameters"]["total"] + told["parameters"]["trained"]
    assert plan["precision"] == told["precision"] or recipe["train"]["precision"] == "float32"
    assert plan["peak_bytes"] == sum(plan["memory"].values()) and plan["fits"] and plan["seconds"] > 0
    assert "parameters" in tunesmith("plan", path).out


def test_check_colours_what_carries_loss_and_keeps_nothing(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("check", path)
    assert said.code == 0
    assert "\x1b[30;42m" in said.out  # black on green
    assert "60 rows read, 60 accepted, 0 rejected" in said.out.replace("\x1b[0m", "")
    shown = tunesmith("check", path, "--json").json["shown"]
    assert len(shown) == 3
    assert not (tmp_path / "runs").exists()


def test_runs_are_listed_compared_and_removed(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    for name, rank in (("one", 2), ("two", 4)):
        done = tunesmith("run", path, "--set", f"name={name}", "--set", f"train.adapter.rank={rank}", "--json")
        assert done.code == 0
    assert [r["run"] for r in tunesmith("runs", "list", "--json").json] == ["one", "two"]
    assert tunesmith("runs", "show", "two", "--json").json["train"]["steps"] == 6
    difference = {d["what"]: (d["one"], d["two"]) for d in tunesmith("runs", "diff", "one", "two", "--json").json}
    assert difference["train.adapter.rank"] == ("2", "4")
    assert tunesmith("runs", "rm", "one", "--json").code == 2  # nobody to ask, and not told to
    assert tunesmith("runs", "rm", "one", "--yes").code == 0
    assert not (tmp_path / "runs/one").exists()
    assert [r["run"] for r in tunesmith("runs", "list", "--json").json] == ["two"]


def test_results_of_an_earlier_training_are_not_shown(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("run", path, "--json").code == 0
    run = ts.open_run(tmp_path / "runs/tiny")
    assert run.scorecard is not None
    top = [tmp_path / "runs/tiny" / name for name in ("scorecard.json", "report.html", "README.md")]
    assert all(file.exists() for file in top)

    assert tunesmith("train", path, "--set", "train.adapter.rank=2", "--json").code == 0
    assert not any(file.exists() for file in top)
    assert ts.open_run(tmp_path / "runs/tiny").scorecard is None
    shown = tunesmith("runs", "show", "tiny", "--json").json
    assert shown["train"]["steps"] == 6 and not shown.get("verdict") and not shown.get("package")


def test_only_runs_are_removed(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """A project's own folder may hold a recipe.yaml too."""
    write_recipe(tmp_path, recipe, "recipe.yaml")
    said = tunesmith("runs", "rm", ".", "--yes")
    assert said.code == 2 and "no run is called" in said.err
    assert (tmp_path / "recipe.yaml").exists()


def test_changed_training_sets_the_earlier_one_aside(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path).code == 0
    before = (tmp_path / "runs/tiny/train/adapter/adapter_model.safetensors").read_bytes()
    said = tunesmith("train", path, "--set", "train.learning_rate=0.02")
    assert said.code == 0 and "is kept in" in said.err
    kept = list((tmp_path / "runs/tiny/replaced").glob("train-*/adapter/adapter_model.safetensors"))
    assert len(kept) == 1 and kept[0].read_bytes() == before


def test_a_run_without_test_rows_stops_before_training(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["data"]["split"]["test"] = 0
    said = tunesmith("run", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "no test rows" in said.err
    assert not (tmp_path / "runs/tiny/train").exists()


def test_doctor_and_schema(tunesmith: Any) -> None:
    found = tunesmith("doctor", "--json").json
    assert {"versions", "processor", "accelerators", "memory", "extras"} <= set(found)
    assert tunesmith("schema").json["properties"]["train"]


def test_usage_errors_are_exit_code_2(tunesmith: Any) -> None:
    assert tunesmith("run").code == 2
    assert tunesmith("nothing").code == 2
    assert tunesmith("run", "quickstart", "--what").code == 2


def test_the_next_command_means_the_same_run(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """What is printed can be typed: with the run's own settings, and where its runs lie."""
    path = write_recipe(tmp_path, recipe)
    said = tunesmith(
        "train", path, "--set", "name=other", "--set", "train.max_steps=2", "--runs", tmp_path / "else where"
    )
    (line,) = [line for line in said.out.splitlines() if line.startswith("Next:")]
    words = shlex.split(line.partition("evaluate ")[2])
    assert tunesmith("evaluate", *words).code == 0
    assert (tmp_path / "else where/other/scorecard.json").is_file()


def test_show_tells_the_stages_and_nobody_is_asked_where_nobody_is(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    said = tunesmith("runs", "show", "tiny")
    assert "evaluate" in said.out and "missing" in said.out and "steps 6" in said.out
    said = tunesmith("runs", "rm", "tiny")
    assert said.code == 2 and "Add --yes" in said.err and (tmp_path / "runs/tiny").is_dir()
    said = tunesmith("chat", "tiny", "--say", "Item 1 is red. What colour is it?", "--max-new-tokens", 1, "--json")
    assert said.code == 0 and len(said.json["tuned"].split()) <= 1
    said = tunesmith("chat", "tiny", "--say", "")
    assert said.code == 2 and "nothing to answer" in said.err


def test_a_starter_tells_of_rows_that_cannot_be_used(tunesmith: Any, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n{"prompt": "c", "completion": "d"}\n')
    said = tunesmith("init", file, "-o", tmp_path / "some.yaml")
    assert said.code == 0 and "3 rows; 1 of them can't be used" in said.out.replace("\n", " ")


def test_a_runs_folder_that_cannot_be(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--runs", tmp_path / "file")
    assert said.code == 2 and "can't be made" in said.err and "--runs" in said.err
