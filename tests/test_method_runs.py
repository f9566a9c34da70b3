"""Every method through the front door: trained, stopped, gone on with to the same bytes, proved and packaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith as ts
from tests.conftest import COLOURS, colour_rows, make_model, write_jsonl, write_recipe
from tunesmith.runs import read_jsonl

ASKED = [row["prompt"] for row in colour_rows(48)]
PAIRS = [
    {"prompt": asked, "chosen": COLOURS[i % 4], "rejected": COLOURS[(i + 1 + i % 3) % 4]}
    for i, asked in enumerate(ASKED)
]
RATED = [
    {"prompt": asked, "completion": COLOURS[(i + i % 2) % 4], "label": i % 2 == 0} for i, asked in enumerate(ASKED)
]
TEXTS = [{"text": asked + " It is " + COLOURS[i % 4] + ". " * (i % 9)} for i, asked in enumerate(ASKED)]
PLAIN = [{"prompt": asked, "completion": COLOURS[i % 4]} for i, asked in enumerate(ASKED)]
METHODS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "text": ("text", TEXTS),
    "dpo": ({"kind": "dpo", "sft_weight": 0.5}, PAIRS),
    "cpo": ("cpo", PAIRS),
    "simpo": ("simpo", PAIRS),
    "orpo": ("orpo", PAIRS),
    "kto": ("kto", RATED),
    "reward": ("reward", PAIRS),
    "classify": ("classify", PLAIN),
    "distill": ({"kind": "distill", "teacher": "", "beta": 0.5}, PLAIN),
}


def files(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for name in ("adapter", "model") for p in (run / "train" / name).glob("*.safeten*")}


def to_train(recipe: dict[str, Any], name: str, folder: Path, model: Path, **settings: Any) -> None:
    """Make the recipe one of a method, with rows for it."""
    method, rows = METHODS[name]
    if name == "distill":
        method = method | {"teacher": str(model)}
    write_jsonl(folder / "rows.jsonl", rows)
    recipe["train"] |= {"method": method} | settings


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_goes_on_exactly_and_is_proved(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, tiny_model: Path, name: str
) -> None:
    to_train(recipe, name, tmp_path, tiny_model, max_steps=4, learning_rate=0.003, checkpoint_every=2)
    if name in ("reward", "classify"):
        recipe["train"]["adapter"] = {"kind": "lora", "rank": 4} if name == "classify" else "full"
    recipe["package"] = {"precision": "float32"}
    path, run = write_recipe(tmp_path, recipe), tmp_path / "runs/tiny"
    said = tunesmith("train", path)
    assert said.code == 0, said.err
    assert "rows packed" in said.err
    whole = files(run)
    lines = read_jsonl(run / "metrics.jsonl")
    assert "validation_loss" in lines[-1]
    shown = read_jsonl(run / "train/samples.jsonl")
    assert bool(shown) == (name not in ("reward", "classify"))
    held = {row["id"]: row for row in read_jsonl(run / "data/validation.jsonl")}
    for sample in shown:
        row = held[sample["row"]]
        if name == "text":
            assert sample["asked"] and sample["asked"] + sample["reference"] == row["text"]
        else:
            assert sample["asked"] == row["messages"][-2]["content"] and row.get("good", True)
            assert sample["reference"] == row["messages"][-1]["content"]

    for made in ("adapter", "model", "checkpoints/step-000004"):
        shutil.rmtree(run / "train" / made, ignore_errors=True)
    (run / "train/manifest.json").unlink()
    said = tunesmith("train", path)
    assert said.code == 0 and "Going on from step 2" in said.err, said.err
    assert files(run) == whole
    assert [line["loss"] for line in read_jsonl(run / "metrics.jsonl")] == [line["loss"] for line in lines]

    said = tunesmith("run", path, "--json")
    assert said.code == 0, said.out
    goal = {"text": "loss", "kto": "accuracy", "classify": "accuracy", "distill": "accuracy"}.get(name, "preference")
    assert said.json["scorecard"]["goal_metric"] == goal
    check = json.loads((run / "package/manifest.json").read_text())["check"]
    assert check["same_next_token"] > 0.99


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_with_an_adapter_there_is_one_model_in_memory(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, tiny_model: Path, monkeypatch: Any, name: str
) -> None:
    """The reference is the base itself, asked before it gets its adapter: loaded once, and never copied."""
    import gc

    from transformers import PreTrainedModel

    from tunesmith.train import train as loop

    def models() -> int:
        gc.collect()
        found = [x for x in gc.get_objects() if issubclass(type(x), PreTrainedModel) and hasattr(x, "lm_head")]
        return sum(next(x.parameters()).device.type != "meta" for x in found)

    loaded, seen, step, load = [], [], loop._step, PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, *given: Any, **keys: Any) -> Any:
        loaded.append(cls)
        return load(cls, *given, **keys)

    def stepped(*given: Any) -> Any:
        seen.append(models())
        return step(*given)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(counted))
    monkeypatch.setattr(loop, "_step", stepped)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))  # no reference is kept there yet
    before = models()
    to_train(recipe, name, tmp_path, tiny_model, max_steps=2)
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    assert list((tmp_path / "cache/reference").iterdir())
    assert len(loaded) == 1 and seen == [before + 1] * 2


def test_a_packaged_classifier_is_what_transformers_loads(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Batched, with padding, by its own tokenizer: the classes that the run's evaluation found."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    recipe["train"] |= {"method": {"kind": "classify", "weights": "balanced"}, "max_steps": 30, "learning_rate": 0.01}
    said = tunesmith("run", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out
    run = tmp_path / "runs/tiny"
    model = AutoModelForSequenceClassification.from_pretrained(run / "package/model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "package/model")
    answers = read_jsonl(run / "evaluate/answers.jsonl")
    asked = [
        tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in answers
    ]
    batch = tokenizer(asked, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        found = model(**batch).logits.argmax(-1).tolist()
    assert [model.config.id2label[i] for i in found] == [row["tuned"]["answer"] for row in answers]
    assert ts.open_run(run).chat(answers[0]["prompt"][-1]["content"]) == answers[0]["tuned"]["answer"]


def test_another_teacher_in_the_same_place_is_another_training(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_model, teacher)
    recipe["train"] |= {"method": {"kind": "distill", "teacher": str(teacher)}, "max_steps": 1}
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path).code == 0
    assert "train: up to date" in tunesmith("train", path).err
    make_model(teacher, num_hidden_layers=1)
    said = tunesmith("train", path)
    assert said.code == 0 and "train: up to date" not in said.err
    said = tunesmith("train", path, "--set", f"train.method.teacher={tmp_path}/nowhere")
    assert said.code == 2 and "nowhere" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("name", METHODS)
def test_each_method_trains_an_adapter_on_rounded_weights(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, tiny_model: Path, name: str
) -> None:
    """Also a head, which is float32 where what it reads is not."""
    to_train(recipe, name, tmp_path, tiny_model, precision="bfloat16", max_steps=2)
    said = tunesmith("run" if name in ("reward", "classify") else "train", write_recipe(tmp_path, recipe))
    assert said.code == 0 and "speed: bfloat16, rows packed" in said.err, said.err
    assert ("chat tiny" in said.out + said.err) == (name == "classify")  # a reward model does not talk


def test_a_method_says_which_rows_it_takes(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    for verb in ("train", "check"):
        said = tunesmith(verb, write_recipe(tmp_path, recipe))
        assert said.code == 2 and "method sft learns from conversation rows" in said.err
        assert "cpo or dpo or orpo or reward or simpo" in said.err


def test_a_classifier_of_one_class_is_refused(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [row | {"completion": "red"} for row in colour_rows()])
    recipe["train"]["method"] = "classify"
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "there is only one class: 'red'" in said.err


def test_long_texts_become_several_examples(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "What colour is it? " * 60}] * 1 + TEXTS)
    recipe["train"] |= {"method": "text", "max_length": 64}
    recipe["data"]["split"] = {"validation": 0, "test": 0}
    path = write_recipe(tmp_path, recipe)
    plan = tunesmith("plan", path, "--json").json
    assert plan["rows"] > len(TEXTS) + 2
