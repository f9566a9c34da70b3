"""The loop: equal to a plain one, and exact when it is stopped and goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import plain
from tests.conftest import colour_rows, make_model, write_jsonl, write_recipe
from tunesmith.runs import read_jsonl

ADAPTER = "train/adapter/adapter_model.safetensors"


def trained(folder: Path, name: str = "tiny") -> bytes:
    return (folder / name / ADAPTER).read_bytes()


def test_training_lowers_the_loss_and_writes_what_is_promised(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    recipe["train"] |= {"max_steps": 30, "epochs": 10}
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.err
    lines = read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 31))
    promised = {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_bytes",
    }  # fmt: skip
    assert all(promised <= set(line) for line in lines)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    validated = [line for line in lines if "validation_loss" in line]
    assert validated and lines[-1] in validated
    manifest = json.loads((tmp_path / "runs/tiny/train/manifest.json").read_text())
    best = min(validated, key=lambda line: line["validation_loss"])
    assert manifest["summary"]["best_step"] == best["step"]
    assert manifest["summary"]["forward"].startswith("rows packed")
    assert load_file(tmp_path / "runs/tiny" / ADAPTER)


def test_a_plain_loop_on_transformers_and_peft_gives_the_same_weights(
    tunesmith: Any, recipe: Any, tmp_path: Path
) -> None:
    """Ten steps of rows one at a time, PEFT's own forward, transformers' own loss."""
    from peft import LoraConfig, get_peft_model_state_dict

    recipe["train"] |= {"max_steps": 10, "epochs": 3, "keep_best": False, "batch_size": 7}
    assert tunesmith("train", write_recipe(tmp_path, recipe), "--json").code == 0
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = read_jsonl(tmp_path / "runs/tiny/data/train.jsonl")
    done = plain.train(Path(recipe["model"]), config, rows, steps=10, batch_size=7, epochs=3, rate=0.01)
    lines = read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(done.losses, rel=2e-4)
    assert [line["grad_norm"] for line in lines] == pytest.approx(done.norms, rel=2e-3)
    ours, theirs = load_file(tmp_path / "runs/tiny" / ADAPTER), get_peft_model_state_dict(done.model)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2e-3, atol=2e-5, msg=name)


def test_thirty_two_rows_at_once_are_four_times_eight_and_one_at_a_time(
    tunesmith: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of 1 to 60 tokens that carry loss: a step's gradient is that of all its tokens, however many backward passes
    it takes; the losses, norms and weights are a plain loop's over single rows."""
    from peft import LoraConfig, get_peft_model_state_dict

    from tunesmith.train import train as loop
    from tunesmith.train.parallel.alone import Alone

    rows = [
        row | {"completion": " ".join([row["completion"]] * (1 + i * i % 31))} for i, row in enumerate(colour_rows(64))
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe["data"]["split"] = {"validation": 0, "test": 0}
    recipe["train"] |= {"max_steps": 2, "epochs": 9, "batch_size": 32, "checkpoint_every": 9, "max_length": 256}
    passes: list[int] = []
    step, backward = loop._step, Alone.backward

    def stepped(*given: Any) -> Any:
        passes.append(0)
        return step(*given)

    def counted(*given: Any) -> None:
        if passes:
            passes[-1] += 1
        backward(*given)

    monkeypatch.setattr(loop, "_step", stepped)
    monkeypatch.setattr(Alone, "backward", counted)
    done, config = None, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    for pack_tokens, least, most in ((100_000, 1, 1), (420, 3, 6), (1, 32, 32)):
        name = f"by-{pack_tokens}"
        recipe |= {"name": name, "train": recipe["train"] | {"pack_tokens": pack_tokens}}
        passes.clear()
        assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
        assert len(passes) == 2 and all(least <= n <= most for n in passes), passes
        if done is None:
            made = read_jsonl(tmp_path / f"runs/{name}/data/train.jsonl")
            done = plain.train(Path(recipe["model"]), config, made, steps=2, batch_size=32, epochs=9, rate=0.01)
        lines = read_jsonl(tmp_path / f"runs/{name}/metrics.jsonl")
        assert [line["loss"] for line in lines] == pytest.approx(done.losses, rel=1e-5)
        assert [line["grad_norm"] for line in lines] == pytest.approx(done.norms, rel=1e-4)
        ours, theirs = load_file(tmp_path / "runs" / name / ADAPTER), get_peft_model_state_dict(done.model)
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=2e-3, atol=2e-5, msg=key)


def test_a_kill_at_any_moment_ends_in_the_same_adapter(recipe: Any, tmp_path: Path) -> None:
    """Killed at random moments until it is through, against a run that nothing disturbed."""
    recipe["train"] |= {"max_steps": 60, "epochs": 10, "validate_every": 7, "checkpoint_every": 3}
    path = write_recipe(tmp_path, recipe)
    command = [sys.executable, "-m", "tunesmith", "train", str(path), "--json"]
    subprocess.run([*command, "--runs", str(tmp_path / "calm")], check=True, capture_output=True)
    random.seed(os.getpid())
    kills = 0
    for attempt in range(12):
        process = subprocess.Popen(
            [*command, "--runs", str(tmp_path / "stormy")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        metrics = tmp_path / "stormy/tiny/metrics.jsonl"
        goal = random.randint(3, 55)
        deadline = time.time() + 120
        while process.poll() is None and time.time() < deadline:
            if attempt < 4 and len(read_jsonl(metrics)) >= goal:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        process.wait()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stdout.read() if process.stdout else ""
    assert kills
    assert trained(tmp_path / "calm") == trained(tmp_path / "stormy")
    steps = [line["step"] for line in read_jsonl(tmp_path / "stormy/tiny/metrics.jsonl")]
    assert steps == list(range(1, 61))


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(recipe: Any, tmp_path: Path) -> None:
    recipe["train"] |= {"max_steps": 400, "epochs": 100, "checkpoint_every": 1000}
    command = [sys.executable, "-m", "tunesmith", "train", str(write_recipe(tmp_path, recipe))]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs/tiny/metrics.jsonl"
    while len(read_jsonl(metrics)) < 5 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "everything is saved" in said and "goes on from here" in said and "Traceback" not in said
    saved = sorted((tmp_path / "runs/tiny/train/checkpoints").glob("step-*"))
    assert int(saved[-1].name[-6:]) == read_jsonl(metrics)[-1]["step"]


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "optimizer.json"])
def test_a_damaged_checkpoint_is_left_aside(tunesmith: Any, recipe: Any, tmp_path: Path, file: str) -> None:
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path, "--json").code == 0
    whole = trained(tmp_path / "runs")
    (tmp_path / "runs/tiny/train/manifest.json").unlink()
    newest = sorted((tmp_path / "runs/tiny/train/checkpoints").glob("step-*"))[-1] / file
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    said = tunesmith("train", path)
    assert said.code == 0 and "damaged" in said.err
    assert trained(tmp_path / "runs") == whole


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    broken = make_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    name = next(n for n in weights if "layers.1.mlp.down_proj" in n)
    weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    recipe["model"] = str(broken)
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2
    assert "the loss became nan in step 1" in said.err and "rows.jsonl:" in said.err
    assert "Traceback" not in said.err
    assert list((tmp_path / "runs/tiny/train/checkpoints").glob("step-*"))


def test_early_stopping_keeps_the_best_weights(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    recipe["train"] |= {
        "max_steps": 200, "epochs": 100, "learning_rate": 0.5, "validate_every": 2, "early_stopping": 2,
        "schedule": "constant",
    }  # fmt: skip
    assert tunesmith("train", write_recipe(tmp_path, recipe), "--json").code == 0
    lines = read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")
    losses = [(line["validation_loss"], line["step"]) for line in lines if "validation_loss" in line]
    best = min(losses)[1]
    assert lines[-1]["step"] == best + 4 < 200
    config = json.loads((tmp_path / "runs/tiny/train/manifest.json").read_text())["summary"]
    assert config["best_step"] == best
    best_adapter = tmp_path / "runs/tiny/train/best/adapter_model.safetensors"
    assert best_adapter.read_bytes() == trained(tmp_path / "runs")


@pytest.mark.parametrize(
    ("architecture", "packed"),
    [
        ("qwen2", True),
        ("qwen3", True),
        ("mistral", True),
        ("gemma", True),
        ("gpt_neox", True),
        ("mamba", False),
    ],
)
def test_other_families_train_and_say_how(
    tunesmith: Any, recipe: Any, tmp_path: Path, architecture: str, packed: bool
) -> None:
    """Families of other shapes go through the same loop; what can't be packed goes row by row, and says so."""
    recipe["model"] = str(make_model(tmp_path / architecture, architecture=architecture, head_dim=8))
    if architecture == "mamba":  # PEFT refuses an update on its output projections
        recipe["train"]["adapter"]["targets"] = ["in_proj", "x_proj"]
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out + said.err
    lines = read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")
    assert all(line["loss"] > 0 for line in lines)
    assert said.json["train"]["forward"].startswith("rows packed" if packed else "one row at a time")


def test_two_at_once_are_refused(recipe: Any, tmp_path: Path, tunesmith: Any) -> None:
    from tunesmith.runs import Run

    path = write_recipe(tmp_path, recipe)
    with Run(tmp_path / "runs/tiny").lock():
        said = tunesmith("train", path)
    assert said.code == 2 and "another process" in said.err


def test_rows_of_several_turns_train_every_answer_or_the_last(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    turns = [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"},
    ]  # fmt: skip
    rows = [{"messages": [{"role": "system", "content": f"Row {i}"}, *turns]} for i in range(20)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe["data"]["split"] = {"validation": 0, "test": 2}
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out
    for shown in said.json["shown"]:
        assert "".join(text for text, weight in shown if weight) == "1<|im_end|>2<|im_end|>"
    recipe["train"]["method"] = {"kind": "sft", "loss_on": "last"}
    for shown in tunesmith("check", write_recipe(tmp_path, recipe), "--json").json["shown"]:
        assert "".join(text for text, weight in shown if weight) == "2<|im_end|>"
    recipe["train"]["max_steps"] = 2
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    made = read_jsonl(tmp_path / "runs/tiny/data/train.jsonl")
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    done = plain.train(Path(recipe["model"]), config, made, steps=2, batch_size=4, epochs=1, rate=0.01)
    lines = read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(done.losses, rel=2e-4)


def test_the_sample_rows_are_label_like() -> None:
    from tunesmith.conversation.message import Conversation, Message
    from tunesmith.data.prepare import answers_kind

    rows = [Conversation((Message("user", r["prompt"]), Message("assistant", r["completion"]))) for r in colour_rows()]
    assert answers_kind(rows) == "label"


@pytest.mark.parametrize("name", ["cosine", "linear", "constant", "wsd"])
def test_the_rates_are_transformers_rates(name: str) -> None:
    """Shifted by one in the warm-up (our first step already learns), so compared after it."""
    from transformers import get_scheduler

    from tunesmith.train.batching import learning_rate

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    kinds = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
    extra = {"num_decay_steps": 6, "num_stable_steps": 21, "decay_type": "linear"} if name == "wsd" else {}
    made = get_scheduler(kinds.get(name, name), optimizer, 3, 30, extra or None)
    theirs = []
    for _ in range(30):
        theirs.append(made.get_last_lr()[0])
        optimizer.step()
        made.step()
    ours = [learning_rate(step, 30, 0.5, 0.1, name, 0.2) for step in range(30)]
    assert ours[:3] == pytest.approx([0.5 / 3, 1.0 / 3, 0.5])
    assert ours[3:] == pytest.approx(theirs[3:])
