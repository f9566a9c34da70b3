"""`auto` is a number by a stated rule: the same everywhere, kept, and as if it had been written there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_model, write_recipe
from tunesmith.train import auto
from tunesmith.train.adapters.full import Full
from tunesmith.train.adapters.lora import Lora
from tunesmith.train.adapters.others import Ia3
from tunesmith.train.section import TrainSection


def config(family: str, size: int) -> Any:
    return type("Config", (), {"hidden_size": size, "model_type": family})


@pytest.mark.parametrize(
    ("family", "size", "rate"),
    # As tinker_cookbook.hyperparam_utils.get_lr gives for Llama-3.2-1B, Llama-3.1-8B, Qwen3-8B.
    [("llama", 2048, 4.9e-4), ("llama", 4096, 2.9e-4), ("qwen3", 4096, 4.7e-4), ("phi3", 4096, 2.9e-4)],
)
def test_rates_are_the_published_rule(family: str, size: int, rate: float) -> None:
    def chosen(adapter: Any, method: str = "sft", optimizer: str = "adamw") -> float:
        section = TrainSection(learning_rate="auto", optimizer=optimizer)
        return auto.learning_rate(config(family, size), adapter, method, section.optimizer).value

    assert chosen(Lora()) == pytest.approx(rate, rel=0.05)
    assert chosen(Full()) == pytest.approx(rate / 10, rel=0.05)
    assert chosen(Lora(), "dpo") == pytest.approx(rate / 40, rel=0.05)
    assert chosen(Lora(alpha=64)) == pytest.approx(rate / 2, rel=0.05)
    assert chosen(Ia3()) == 3e-3
    assert rate / 10 < chosen(Lora(), optimizer="lion") < rate / 3  # as the paper has it
    assert rate < chosen(Lora(), optimizer="schedule_free") < 10 * rate  # as its authors have it
    for same in ("muon", "adamw_8bit"):
        assert chosen(Lora(), optimizer=same) == chosen(Lora())


@pytest.mark.parametrize(("rows", "passes"), [(10, 10), (3, 25), (33, 3), (50, 3), (8_000, 3), (12_500, 2), (10**6, 1)])
def test_epochs(rows: int, passes: int) -> None:
    assert auto.epochs(rows, "sft").value == passes
    assert auto.epochs(rows, "dpo").value == 1


@pytest.mark.parametrize(("rows", "size"), [(50, 8), (4_000, 8), (5_000, 16), (10_000, 32), (10**6, 64)])
def test_batches(rows: int, size: int) -> None:
    assert auto.batch_size(rows).value == size


@pytest.mark.parametrize(("context", "length"), [(None, 2048), (1024, 1024), (4096, 4096), (131_072, 4096)])
def test_lengths(context: int | None, length: int) -> None:
    assert auto.max_length(context).value == length


@pytest.mark.parametrize(("tokens", "rank"), [(0, 8), (8_192, 8), (8_193, 16), (16_384, 16), (10**9, 16)])
def test_ranks_give_a_weight_a_token(tiny_model: Path, tokens: int, rank: int) -> None:
    """As many weights as tokens that carry loss: rank x (in + out) of each layer; no more than the narrowest allows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model))
    heads = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]  # q k v o, gate up down
    assert 2 * sum(map(sum, heads)) * 8 == 8_192
    wide = Lora(rank="auto", targets=["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    assert auto.rank(Lora(rank="auto"), tokens, model).value == rank  # k and v have 16 outputs
    assert auto.rank(wide, 10**9, model).value == 32


def test_layers_of_gpt2_are_named_and_ranked_as_others_are(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    recipe["model"] = str(make_model(tmp_path / "gpt2", architecture="gpt2"))
    recipe["train"]["adapter"] = {"kind": "lora", "rank": "auto", "targets": ["c_attn"]}
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("plan", path)  # two layers of 32 x 96
    assert said.code == 0 and "train.adapter.rank 8 (2,048 weights for" in said.out + said.err, said.err
    said = tunesmith("check", path, "--set=train.adapter.rank=33")
    assert said.code == 2 and "is 33, more than layer transformer.h.0.attn.c_attn has (96 x 32)" in said.err
    said = tunesmith("check", path, "--set=train.adapter.targets=[q_proj]")
    assert said.code == 2 and "linear layers are called: c_attn, c_fc, c_proj." in said.err


def test_a_run_with_auto_is_the_run_with_those_numbers(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    keys = {"learning_rate": "auto", "batch_size": "auto", "epochs": "auto", "max_length": "auto"}
    recipe["train"] |= keys | {"adapter": {"kind": "lora", "rank": "auto"}}
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("check", path).code == 0
    planned = tunesmith("plan", path, "--json").json
    said = tunesmith("run", path)
    assert said.code == 0 and "train.adapter.rank 8 (" in said.err, said.err
    run = tmp_path / "runs/tiny"
    told = json.loads((run / "train/manifest.json").read_text())["summary"]
    assert planned["trained_parameters"] == told["parameters"]["trained"]
    assert set(told["auto"]) == {*keys, "adapter.rank"}
    assert "Chosen by rule" in (run / "report.html").read_text()
    assert f"{told['auto']['learning_rate']['value']:g}, cosine" in (run / "README.md").read_text()
    sets = [f"--set=train.{key}={choice['value']}" for key, choice in told["auto"].items()]
    assert tunesmith("train", path, "--set=name=other", *sets).code == 0
    adapter = "train/adapter/adapter_model.safetensors"
    assert (run / adapter).read_bytes() == (tmp_path / "runs/other" / adapter).read_bytes()


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor", "galore", "{kind: muon, scale: original}"])
def test_an_optimizer_without_a_rule_wants_a_number(
    tunesmith: Any, recipe: Any, tmp_path: Path, optimizer: str
) -> None:
    path = write_recipe(tmp_path, recipe)
    chosen = ("--set", f"train.optimizer={optimizer}")
    assert tunesmith("check", path, *chosen).code == 0
    said = tunesmith("check", path, *chosen, "--set", "train.learning_rate=auto")
    assert said.code == 2 and "learning_rate auto has no rule for optimizer" in " ".join(said.err.split()), said.err


def test_only_auto_and_numbers_are_taken(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("check", path, "--set", "train.learning_rate=automatic")
    assert said.code == 2 and "train.learning_rate: expected a number" in said.err
    said = tunesmith("check", path, "--set", "train.batch_size=0")
    assert said.code == 2 and "train.batch_size" in said.err
