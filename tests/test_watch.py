"""What is noticed of a run: planted trouble is found, and a calm run gives no alarm."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_model, write_jsonl, write_recipe
from tunesmith.models.packed import PackedForward
from tunesmith.runs import read_jsonl
from tunesmith.train.watch import review


def lines(steps: int = 120, seed: int = 0, validate_every: int = 10) -> list[dict[str, Any]]:
    """A run as it should be: loss falls from 3 to about 1 with noise, validation follows."""
    draw = random.Random(seed)
    made = []
    for step in range(1, steps + 1):
        level = 1 + 2 * math.exp(-step / 30)
        line: dict[str, Any] = {
            "step": step,
            "loss": level + draw.gauss(0, 0.1),
            "grad_norm": 1.0 + abs(draw.gauss(0, 0.25)),
            "seconds": {"step": 1.0, "validation": 0.0},
            "use": 0.9,
        }
        if step % validate_every == 0:
            line["validation_loss"] = level + 0.1 + draw.gauss(0, 0.005)
        made.append(line)
    return made


@pytest.mark.parametrize("seed", range(20))
def test_a_calm_run_gives_no_alarm(seed: int) -> None:
    assert review(lines(seed=seed)) == []


def kinds(found: list[Any]) -> list[str]:
    return [finding.kind for finding in found]


def test_a_spike_is_found_at_its_step() -> None:
    run = lines()
    run[70]["loss"] = 9.0
    (found,) = review(run)
    assert (found.kind, found.step) == ("spike", 71) and "9.000" in found.what and "learning_rate" in found.fix


def test_validation_that_turns_up_while_training_falls_is_overfitting() -> None:
    run = lines()
    for line in run[60:]:
        if "validation_loss" in line:
            line["validation_loss"] += (line["step"] - 60) * 0.02
    (found,) = review(run)
    assert found.kind == "overfitting" and found.step in (80, 90) and "early_stopping" in found.fix


def test_validation_that_rises_with_the_training_loss_is_not_overfitting_but_divergence() -> None:
    run = lines()
    for line in run[60:]:
        rise = (line["step"] - 60) * 0.1
        line["loss"] += rise
        if "validation_loss" in line:
            line["validation_loss"] += rise
    assert "divergence" in kinds(review(run)) and "overfitting" not in kinds(review(run))


def test_gradients_that_swing_or_vanish() -> None:
    swinging, vanishing = lines(), lines()
    for line in swinging[40:]:
        line["grad_norm"] = 10.0 if line["step"] % 2 else 0.5
    for line in vanishing[40:]:
        line["grad_norm"], line["loss"] = 1e-6, 2.0
    assert "noisy_gradients" in kinds(review(swinging))
    assert kinds(review(vanishing)) == ["vanishing_gradients"]


def test_what_stands_still_is_dead_but_not_what_only_starts_late() -> None:
    dead, late = lines(), lines()
    for line in dead:
        line["still"] = ["layers.1.q_proj.lora_A"]
    for line in late[:5]:
        line["still"] = ["layers.1.q_proj.lora_A"]
    (found,) = review(dead)
    assert found.kind == "dead_weights" and "layers.1.q_proj.lora_A" in found.what
    assert review(late) == []


@pytest.mark.parametrize("what", ["data", "validation", "checkpoint"])
def test_time_that_goes_elsewhere_is_named(what: str) -> None:
    run = lines()
    for line in run:
        line["seconds"] = {"step": 0.5, what: 0.5}
    (found,) = review(run)
    assert found.kind == "low_use" and f"50% into {what}" in found.what and found.fix


def test_cores_that_idle_within_a_step_are_named() -> None:
    run = [line | {"use": 0.2} for line in lines()]
    (found,) = review(run)
    assert found.kind == "low_use" and "20% of a step" in found.what


def test_a_run_tells_the_spike_with_its_rows_everywhere(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """Two rows of noise among learnt ones: named, worst first, in events, runs show and the report."""
    asked = [{"prompt": f"Item {i} is red. What colour is it?", "completion": "red"} for i in range(118)]
    noise = [{"prompt": f"Item {i} is odd. What is it?", "completion": "%~@#!?*&^|<}{>" * 2} for i in range(2)]
    write_jsonl(tmp_path / "rows.jsonl", asked + noise)
    recipe["train"] |= {"max_steps": 25, "epochs": 9, "learning_rate": 0.02, "schedule": "constant", "keep_best": False}
    said = tunesmith("run", write_recipe(tmp_path, recipe))
    assert said.code == 0, said.err
    found = [f for f in read_jsonl(tmp_path / "runs/tiny/train/findings.jsonl") if f["kind"] == "spike"]
    assert found and "Noticed at step" in said.err
    rows = {row["id"]: row for row in read_jsonl(tmp_path / "runs/tiny/data/train.jsonl")}
    for finding in found:
        assert "odd" in rows[finding["rows"][0]]["messages"][0]["content"]
    events = [e["finding"] for e in read_jsonl(tmp_path / "runs/tiny/events.jsonl") if e["event"] == "finding"]
    assert found[0] in events
    shown = tunesmith("runs", "show", "tiny", "--json").json
    assert found[0] in shown["findings"] and found[0] in shown["train"]["findings"]
    assert "(spike)" in tunesmith("runs", "show", "tiny").out
    assert 'data-kind="spike"' in (tmp_path / "runs/tiny/report.html").read_text()


def test_a_run_tells_weights_that_nothing_reaches(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """Embeddings of new words that no row has, beside LoRA's weights, which move."""
    recipe["model"] = {"name": str(make_model(tmp_path / "m", tie_word_embeddings=False)), "new_words": ["Zyxelith"]}
    recipe["train"] |= {"max_steps": 24, "epochs": 9, "keep_best": False}
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 0, said.err
    (found,) = [f for f in read_jsonl(tmp_path / "runs/tiny/train/findings.jsonl") if f["kind"] == "dead_weights"]
    assert found["what"].startswith("1 trained tensors have not moved at all: ") and "token" in found["what"]
    assert "1 trained tensors have not moved" in " ".join(said.err.split())


def test_a_run_tells_that_laying_out_rows_holds_it_up(
    tunesmith: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it takes is no part of the step's own time: both together are what the step took."""
    pack = PackedForward.pack

    def slow(*given: Any) -> Any:
        time.sleep(0.04)
        return pack(*given)

    monkeypatch.setattr(PackedForward, "pack", slow)
    recipe["train"] |= {"max_steps": 21, "epochs": 9, "samples": 0, "keep_best": False, "checkpoint_every": 50}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    for line in read_jsonl(tmp_path / "runs/tiny/metrics.jsonl"):
        spent, took = line["seconds"], line["tokens"] / line["tokens_per_second"]
        assert spent["data"] >= 0.04 and spent["data"] + spent["step"] < 1.02 * took
    (found,) = [f for f in read_jsonl(tmp_path / "runs/tiny/train/findings.jsonl") if f["kind"] == "low_use"]
    assert "into data" in found["what"] and "train.pack_tokens" in found["fix"]


def test_the_first_minute_measures_and_changes_nothing(
    tunesmith: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, which draws random numbers: the adapter is the same with and without the steps that are tried."""
    from tunesmith.train import train as loop

    recipe["train"]["adapter"]["dropout"] = 0.2
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("train", path, "--set", "name=tried")
    assert said.code == 0 and "Measured before the first step" in said.err, said.err
    steps = []

    def nothing(*given: Any) -> Any:
        steps.append(given)
        given[-1]()  # the checkpoint that the loop goes back to
        told = {"seconds": 1.0, "peak_bytes": 2**40, "correct": lambda *_: "", "as_dict": lambda _: {}}
        return type("Measured", (), told)()

    monkeypatch.setattr(loop, "calibrate", nothing)
    assert tunesmith("train", path, "--set", "name=untried").code == 0 and steps
    name = "train/adapter/adapter_model.safetensors"
    assert (tmp_path / "runs/tried" / name).read_bytes() == (tmp_path / "runs/untried" / name).read_bytes()
    told = json.loads((tmp_path / "runs/tried/train/manifest.json").read_text())["summary"]
    assert told["measured"]["peak_bytes"] > 0 and told["measured"]["seconds"] > 0
    assert told["measured"]["longest_tokens"] >= told["measured"]["step_tokens"]
    assert not (tmp_path / "runs/tried/train/checkpoints/step-000000").exists()


def test_an_evaluation_is_tried_before_the_first_step(
    tunesmith: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the longest rows that are held out, with a short answer and the best weights' being written; what fails there
    must not do so an hour later."""
    from tunesmith.journey import Journey
    from tunesmith.train import train as loop

    happened: list[tuple[str, int]] = []
    validate, step, ask, save = loop.validate, loop._step, Journey.ask, loop.save

    def validated(section: Any, split: Any, examples: Any, *more: Any) -> Any:
        happened.append(("validation", max(e.tokens for e in examples)))
        return validate(section, split, examples, *more)

    def stepped(*given: Any) -> Any:
        happened.append(("step", 0))
        return step(*given)

    def asked(kit: Any, forward: Any, rows: Any, limit: Any) -> Any:
        happened.append(("answer", limit))
        return ask(kit, forward, rows, limit)

    def saved(section: Any, split: Any, target: Path) -> None:
        happened.append((target.name, 0))
        save(section, split, target)

    monkeypatch.setattr(loop, "validate", validated)
    monkeypatch.setattr(loop, "_step", stepped)
    monkeypatch.setattr(Journey, "ask", asked)
    monkeypatch.setattr(loop, "save", saved)
    recipe["train"] |= {"max_steps": 2, "validate_every": 2}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    evaluation = ["validation", "answer", "best"]
    assert [what for what, _ in happened] == [*evaluation, "step", "step", *evaluation]
    assert happened[0][1] == happened[5][1]  # the longest row of all was among those tried
    assert happened[1][1] < happened[6][1]
    told = json.loads((tmp_path / "runs/tiny/train/manifest.json").read_text())["summary"]["measured"]
    assert told["validation_seconds"] > 0


def test_answers_that_do_not_fit_are_told_before_the_first_step(
    tunesmith: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.journey import Journey

    def ask(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Journey, "ask", ask)
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "an answer, tried before the first step" in " ".join(said.err.split()), said.err
    assert read_jsonl(tmp_path / "runs/tiny/metrics.jsonl") == []


def test_memory_that_steps_leave_behind_goes_back_above_what_the_longest_took(
    tunesmith: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each step that leaves more, and the weights are the same; a few steps of like rows leave no more."""
    from tunesmith.models import machine
    from tunesmith.train import train as loop

    given: list[str] = []
    back = machine.give_back
    ends = []
    for name, slack, expected in (("tiny", 0.0, 3), ("other", 4.0, 0)):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "SLACK", slack)
            patch.setattr(machine, "give_back", lambda: (given.append(""), back()))
            before = len(given)
            recipe |= {"name": name}
            recipe["train"] |= {"max_steps": 3}
            assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
        after_steps = len(given) - before
        ends.append((after_steps, (tmp_path / f"runs/{name}/train/adapter/adapter_model.safetensors").read_bytes()))
        assert after_steps - expected in (0, 1, 2)  # stages give back at their ends as well
    assert ends[0][1] == ends[1][1] and ends[0][0] > ends[1][0]
