"""Training from an earlier adapter or model, merging several, words and experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model, write_jsonl, write_recipe
from tunesmith.runs import read_jsonl


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "train/adapter/adapter_model.safetensors")


@pytest.fixture
def first(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A recipe whose run `tiny` is trained."""
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    return recipe


def test_training_goes_on_from_an_earlier_run_or_takes_it_as_it_is(
    tunesmith: Any, first: dict[str, Any], tmp_path: Path
) -> None:
    last = read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")[-1]["validation_loss"]
    again = first | {"name": "again", "train": first["train"] | {"start_from": "tiny"}}
    assert tunesmith("train", write_recipe(tmp_path, again, "again.yaml")).code == 0
    lines = read_jsonl(tmp_path / "runs/again/metrics.jsonl")
    assert lines[0]["loss"] < read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")[0]["loss"]
    assert lines[-1]["validation_loss"] < last
    taken = first | {"name": "taken"}
    taken["train"] = first["train"] | {"start_from": str(tmp_path / "runs/tiny/train/adapter"), "max_steps": 0}
    said = tunesmith("run", write_recipe(tmp_path, taken, "taken.yaml"), "--json")
    assert said.code == 0 and said.json["train"]["steps"] == 0, said.err
    before, after = adapter(tmp_path / "runs/tiny"), adapter(tmp_path / "runs/taken")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"start_from": "nothing"}, ["no run is called 'nothing'"]),
        ({"start_from": "tiny", "adapter": {"kind": "lora", "rank": 8, "alpha": 8}}, ["its r is 4", "(rank)"]),
        ({"start_from": "tiny", "adapter": {"kind": "loha", "rank": 4, "alpha": 8}}, ["peft_type is LORA", "(kind)"]),
        (
            {"start_from": "tiny", "adapter": {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q_proj"]}},
            ["weights are not those that would be trained", "targets"],
        ),
        ({"start_from": "tiny", "adapter": "full"}, ["holds an adapter, and a whole model is to be trained"]),
        ({"start_from": "tiny", "adapter": {"kind": "bottleneck", "size": 8}}, ["holds no bottleneck adapter"]),
        ({"start_from": "tiny", "adapter": "p-tuning"}, ["can't start from what was trained before"]),
        ({"max_steps": 0}, ["goes with start_from only"]),
    ],
)
def test_what_is_no_start_is_said(
    tunesmith: Any, first: dict[str, Any], tmp_path: Path, keys: dict[str, Any], parts: list[str]
) -> None:
    other = first | {"name": "other", "train": first["train"] | keys}
    said = tunesmith("train", write_recipe(tmp_path, other, "other.yaml"))
    assert said.code == 2 and "Traceback" not in said.err
    for part in parts:
        assert part in said.err.replace("\n", " "), said.err


def test_an_adapter_of_another_base_is_no_start(tunesmith: Any, first: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "elsewhere", initializer_range=0.2)
    other = first | {"name": "other", "model": str(folder), "train": first["train"] | {"start_from": "tiny"}}
    said = tunesmith("train", write_recipe(tmp_path, other, "other.yaml"))
    assert said.code == 2 and "was made for another base" in said.err.replace("\n", " ")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "as if it were cut short"),
        (lambda file: file.write_bytes(b""), "as if it were cut short"),
        (
            lambda file: save_file({n: w / 0 for n, w in load_file(file).items()}, file),
            "not finite, such as base_model",
        ),
    ],
)
def test_a_spoilt_adapter_is_never_taken(
    tunesmith: Any, first: dict[str, Any], tmp_path: Path, spoil: Callable[[Path], Any], told: str
) -> None:
    shutil.copytree(tmp_path / "runs/tiny/train/adapter", tmp_path / "runs/bad")
    spoil(tmp_path / "runs/bad/adapter_model.safetensors")
    other = first | {"name": "other", "train": first["train"] | {"start_from": "runs/bad", "max_steps": 0}}
    for words in (("train", write_recipe(tmp_path, other, "other.yaml")), ("merge", "out", "tiny", "runs/bad")):
        said = tunesmith(*words)
        assert said.code == 2 and told in said.err and "runs/bad" in said.err and "Traceback" not in said.err, said.err


def test_whole_models_go_on_too(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"] |= {"adapter": "full", "learning_rate": 0.003}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    recipe |= {"name": "again", "train": recipe["train"] | {"start_from": "tiny"}}
    assert tunesmith("train", write_recipe(tmp_path, recipe, "again.yaml")).code == 0
    losses = [read_jsonl(tmp_path / f"runs/{name}/metrics.jsonl")[0]["loss"] for name in ("tiny", "again")]
    assert losses[1] < losses[0]


def test_merged_adapters_are_the_weighted_sum_of_their_updates(
    tunesmith: Any, first: dict[str, Any], tmp_path: Path
) -> None:
    second = first | {"name": "second", "seed": 8}
    second["train"] = first["train"] | {"adapter": {"kind": "lora", "rank": 6, "alpha": 6}}
    assert tunesmith("train", write_recipe(tmp_path, second, "second.yaml")).code == 0
    said = tunesmith("merge", "both", "tiny", "second", "--weight", 0.7, "--weight", 0.3, "--how", "cat", "--json")
    assert said.code == 0 and said.json["rank"] == 10, said.err

    def update(weights: dict[str, torch.Tensor], scale: float, layer: str) -> torch.Tensor:
        return scale * weights[f"{layer}.lora_B.weight"] @ weights[f"{layer}.lora_A.weight"]

    merged = load_file(tmp_path / "both/adapter_model.safetensors")
    config = json.loads((tmp_path / "both/adapter_config.json").read_text())
    one, two = adapter(tmp_path / "runs/tiny"), adapter(tmp_path / "runs/second")
    layer = "base_model.model.model.layers.1.mlp.up_proj"
    expected = 0.7 * update(one, 2.0, layer) + 0.3 * update(two, 1.0, layer)
    assert torch.allclose(update(merged, config["lora_alpha"] / config["r"], layer), expected, atol=1e-5)

    assert said.json["alpha"] == config["lora_alpha"]
    third = first | {"name": "third"}  # as the command says
    third["train"] = first["train"] | {
        "start_from": "both", "max_steps": 0, "adapter": {"kind": "lora", "rank": 10, "alpha": said.json["alpha"]}
    }  # fmt: skip
    said = tunesmith("run", write_recipe(tmp_path, third, "third.yaml"))
    assert said.code == 0, said.err
    for number, how in enumerate(("svd", "linear", "ties", "dare-linear", "dare-ties")):
        said = tunesmith("merge", f"of-{number}", "tiny", "taken" if number else "second", "--how", how)
        assert (said.code == 0) == (not number), f"{how}: {said.err}"
    shutil.copytree(tmp_path / "runs/tiny", tmp_path / "runs/taken")


@pytest.mark.parametrize("how", ["linear", "ties", "dare-linear", "dare-ties", "svd"])
def test_each_way_of_merging_is_pefts(tunesmith: Any, first: dict[str, Any], tmp_path: Path, how: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    second = first | {"name": "second", "seed": 8}
    assert tunesmith("train", write_recipe(tmp_path, second, "second.yaml")).code == 0
    words = ("--weight", 0.7, "--weight", 0.4, "--how", how, "--density", 0.3, "--seed", 11)
    said = tunesmith("merge", "both", "tiny", "second", *words)
    assert said.code == 0, said.err
    folders = [str(tmp_path / f"runs/{name}/train/adapter") for name in ("tiny", "second")]
    base = AutoModelForCausalLM.from_pretrained(first["model"], dtype=torch.float32)
    torch.manual_seed(11)
    theirs = PeftModel.from_pretrained(base, folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], adapter_name="b")
    thinned = {} if how in ("linear", "svd") else {"density": 0.3}
    theirs.add_weighted_adapter(["a", "b"], [0.7, 0.4], "m", combination_type=how.replace("-", "_"), **thinned)
    theirs.save_pretrained(str(tmp_path / "theirs"), selected_adapters=["m"])
    expected, found = (
        load_file(tmp_path / "theirs/m/adapter_model.safetensors"),
        load_file(tmp_path / "both/adapter_model.safetensors"),
    )
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=name)
    if how in ("ties", "dare-ties", "dare-linear"):  # of two adapters' entries, three in ten each were kept
        share = sum((w == 0).sum().item() for w in found.values()) / sum(w.numel() for w in found.values())
        assert 0.4 < share < 0.72


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("out", "tiny"), "Name two adapters or more"),
        (("out", "tiny", "tiny", "--weight", 1), "a --weight for each"),
        (("out", "tiny", "tiny", "--weight", "nan", "--weight", 1), "nan, 1.0 are no weights"),
        (("out", "tiny", "tiny", "--weight", 0, "--weight", 0), "0.0, 0.0 are no weights"),
        (("out", "tiny", "tiny", "--how", "magic"), "no way is called 'magic'"),
        (("out", "tiny", "tiny"), "an adapter is named twice"),
        (("out", "tiny", "tiny", "--how", "ties", "--density", 0), "0.0 keeps nothing"),
        (("runs", "tiny", "tiny"), "is there already"),
        (("out", "tiny", "absent"), "no run is called 'absent'"),
    ],
)
def test_what_can_t_be_merged_is_said(tunesmith: Any, first: dict[str, Any], words: tuple[Any, ...], part: str) -> None:
    said = tunesmith("merge", *words)
    assert said.code == 2 and part in said.err, said.err


def test_an_adapter_with_a_head_is_not_merged_without_it(tunesmith: Any, first: dict[str, Any], tmp_path: Path) -> None:
    other = first | {"name": "classes", "train": first["train"] | {"method": "classify", "max_steps": 1}}
    assert tunesmith("train", write_recipe(tmp_path, other, "classes.yaml")).code == 0
    said = tunesmith("merge", "out", "tiny", "classes")
    assert said.code == 2 and "has a head of classes" in said.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "part"), [({"kind": "bottleneck", "size": 4}, "holds bottlenecks"), ("full", "holds a whole model")]
)
def test_only_lora_is_merged(
    tunesmith: Any, first: dict[str, Any], tmp_path: Path, kind: dict[str, Any] | str, part: str
) -> None:
    other = first | {"name": "other", "train": first["train"] | {"adapter": kind, "max_steps": 1}}
    assert tunesmith("train", write_recipe(tmp_path, other, "other.yaml")).code == 0
    said = tunesmith("merge", "out", "tiny", "other")
    assert said.code == 2 and f"{part}, and only LoRA adapters can be merged" in " ".join(said.err.split()), said.err


@pytest.mark.parametrize("kind", [{"kind": "lora", "rank": 4}, {"kind": "tokens"}, {"kind": "full"}])
def test_new_words_are_one_token_each_through_the_whole_journey(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, kind: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["Zyxelith", "Quormag"]
    rows = [
        {"prompt": f"What is item {i}?", "completion": words[i % 2]} for i in range(40)
    ]  # fmt: skip
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe["model"] = {"name": recipe["model"], "new_words": words}
    recipe["train"] |= {"adapter": kind}
    path, run = write_recipe(tmp_path, recipe), tmp_path / "runs/tiny"
    assert tunesmith("plan", path).code == 0
    said = tunesmith("run", path)
    assert said.code == 0, said.err
    base = AutoTokenizer.from_pretrained(recipe["model"]["name"])
    tokenizer = AutoTokenizer.from_pretrained(run / "package/model")
    assert len(tokenizer) == len(base) + 2 and all(len(tokenizer(w)["input_ids"]) == 1 for w in words)
    before = AutoModelForCausalLM.from_pretrained(recipe["model"]["name"]).get_input_embeddings().weight
    after = AutoModelForCausalLM.from_pretrained(run / "package/model", dtype=torch.float32)
    grown = after.get_input_embeddings().weight
    assert grown.shape[0] == before.shape[0] + 2
    assert torch.equal(grown[: before.shape[0]], before) == (kind["kind"] != "full")
    for number, word in enumerate(words):
        start = before[base(word, add_special_tokens=False)["input_ids"]].mean(0)
        assert (grown[before.shape[0] + number] - start).abs().max() > 1e-3  # it was trained


def test_words_that_an_adapter_would_not_train_are_refused(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["model"] = {"name": recipe["model"], "new_words": ["Zyxelith"]}
    recipe["train"]["adapter"] = "ia3"
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "model.new_words" in said.err and "untrained" in said.err


@pytest.mark.parametrize("targets", [["experts"], ["q_proj", "experts"]])
def test_experts_of_a_mixture_are_trained(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, targets: list[str]
) -> None:
    folder = make_model(tmp_path / "mixture", architecture="mixtral", num_local_experts=4, num_experts_per_tok=2)
    recipe |= {"model": str(folder), "package": {"precision": "float32"}}
    recipe["train"] |= {"adapter": {"kind": "lora", "rank": 2, "targets": targets}, "max_steps": 4}
    path, run = write_recipe(tmp_path, recipe), tmp_path / "runs/tiny"
    assert tunesmith("train", path).code == 0
    whole = adapter(run)
    assert any(".experts." in n for n in whole) and any("q_proj" in n for n in whole) == (len(targets) == 2)
    for made in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(run / "train" / made)
    (run / "train/manifest.json").unlink()
    assert tunesmith("run", path).code == 0
    again = adapter(run)
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    before, after = load_file(folder / "model.safetensors"), load_file(run / "package/model/model.safetensors")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed and all(".experts." in n or "q_proj" in n for n in changed)


def test_patterns_choose_layers(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"]["adapter"] = {"kind": "lora", "rank": 2, "targets": ["*.layers.1.mlp.*", "o_proj"]}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    names = {
        n.removeprefix("base_model.model.model.layers.").rpartition(".lora_")[0]
        for n in adapter(tmp_path / "runs/tiny")
    }
    mlp = {f"1.mlp.{part}_proj" for part in ("gate", "up", "down")}
    assert names == mlp | {"0.self_attn.o_proj", "1.self_attn.o_proj"}
