"""A frozen base in four or eight bits: what its layers compute, that it is small, and what can be trained on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model, write_recipe
from tunesmith.models.resolve import ResolvedModel
from tunesmith.runs import read_jsonl

LIBRARY = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int4-torchao": "torchao", "int8-torchao": "torchao"}


@pytest.fixture(params=LIBRARY)
def quantise(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(LIBRARY[request.param])
    return str(request.param)


def resolved(folder: Path) -> ResolvedModel:
    return ResolvedModel("tiny", folder, "folder", "0" * 64, None, None, False, None, None)


def loss(model: Any) -> float:
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_nf4_computes_what_bitsandbytes_own_layers_compute(tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from tunesmith.models.load import load_model

    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_model,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    ).train()  # for evaluation they round scales to bfloat16, on some processors
    ours = load_model(resolved(tiny_model), torch.float32, quantise="nf4")
    plain = load_model(resolved(tiny_model), torch.float32)
    assert loss(ours) == pytest.approx(loss(theirs), abs=1e-5)
    assert abs(loss(ours) - loss(plain)) > 1e-4


@pytest.mark.parametrize(("name", "config"), [("int8-torchao", "int8"), ("int4-torchao", "int4")])
def test_torchao_s_bits_mean_what_torchao_makes_of_them(name: str, config: str) -> None:
    ao = pytest.importorskip("torchao.quantization")
    from tunesmith.models.quantise import FORMATS

    int4 = ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(32), ao.MappingType.ASYMMETRIC)
    layer = torch.nn.Linear(64, 48, bias=False)
    weight = layer.weight.detach().clone()
    ao.quantize_(layer, {"int8": ao.Int8WeightOnlyConfig(), "int4": int4}[config])
    coder = FORMATS[name].coder
    assert torch.allclose(coder.whole(*coder.quantise(weight), torch.float32), layer.weight.dequantize(), atol=1e-6)


def test_a_quantised_layer_has_the_gradient_of_its_matrix(quantise: str) -> None:
    from tunesmith.models.quantise import FORMATS, QuantLinear

    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 48)
    layer = QuantLinear(plain, FORMATS[quantise].coder)
    layer.weight, layer.bias = layer.fill(plain.weight.detach()), plain.bias
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).square().sum().backward()
    given, x.grad = x.grad, None
    torch.nn.functional.linear(x, layer.dequantize(), plain.bias).square().sum().backward()
    assert torch.allclose(given, x.grad, atol=1e-5)
    off = (layer.dequantize() - plain.weight).abs().max() / plain.weight.abs().max()
    assert off < (0.01 if "8" in quantise else 0.2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_on_a_quantised_base_goes_on_exactly(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, quantise: str, precision: str
) -> None:
    recipe["train"] |= {"quantise": quantise, "precision": precision, "max_steps": 4, "learning_rate": 0.003}
    path, run = write_recipe(tmp_path, recipe), tmp_path / "runs/tiny"
    said = tunesmith("train", path)
    assert said.code == 0, said.err
    summary = json.loads((run / "train/manifest.json").read_text())["summary"]
    assert "LoRA layers" in summary["forward"]
    losses = [line["loss"] for line in read_jsonl(run / "metrics.jsonl")]
    assert min(losses[1:]) < losses[0]
    whole = (run / "train/adapter/adapter_model.safetensors").read_bytes()
    for made in ("adapter", "checkpoints/step-000004"):
        shutil.rmtree(run / "train" / made)
    (run / "train/manifest.json").unlink()
    assert tunesmith("train", path).code == 0
    assert (run / "train/adapter/adapter_model.safetensors").read_bytes() == whole


def test_the_weights_are_small_and_plan_says_so(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, quantise: str
) -> None:
    from tunesmith.models.load import load_model
    from tunesmith.models.quantise import FORMATS, parameter_count, weight_bytes

    folder = make_model(tmp_path / "wide", hidden_size=128, intermediate_size=512)
    whole = load_model(resolved(folder), torch.bfloat16)
    packed = load_model(resolved(folder), torch.bfloat16, quantise=quantise)
    assert parameter_count(packed) == parameter_count(whole) == sum(p.numel() for p in whole.parameters())
    linear = sum(m.weight.numel() for m in whole.modules() if isinstance(m, torch.nn.Linear))
    linear -= whole.lm_head.weight.numel()
    rest = weight_bytes(whole) - 2 * linear
    held = weight_bytes(packed) - rest
    assert held == pytest.approx(linear * FORMATS[quantise].bits / 8, rel=0.15)
    recipe |= {"model": str(folder)}
    recipe["train"] |= {"quantise": quantise, "precision": "bfloat16"}
    planned = tunesmith("plan", write_recipe(tmp_path, recipe), "--json").json["memory"]["weights"]
    assert planned == pytest.approx(weight_bytes(packed) + 2 * 512 * 128, rel=0.15)


@pytest.mark.parametrize("architecture", ["gpt2", "falcon"])
def test_linear_layers_of_other_classes_are_small_as_well(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, quantise: str, architecture: str
) -> None:
    """GPT-2's hold their weights the other way round, Falcon's are a class of their own: the model computes what
    transformers computes with the weights that are meant."""
    from tunesmith.models.load import load_model
    from tunesmith.models.quantise import FORMATS, weight_bytes

    sizes = {"hidden_size": 128, "intermediate_size": 512, "ffn_hidden_size": 512}
    folder = make_model(tmp_path / architecture, architecture=architecture, **sizes)
    whole = load_model(resolved(folder), torch.float32)
    packed = load_model(resolved(folder), torch.float32, quantise=quantise)
    coder, turned, linear = FORMATS[quantise].coder, architecture == "gpt2", 0
    for name, weight in whole.named_parameters():
        if ".h." in name and weight.ndim == 2:
            linear += weight.numel()
            meant = coder.whole(
                *coder.quantise(weight.detach().T.contiguous() if turned else weight.detach()), weight.dtype
            )
            weight.data = meant.T.contiguous() if turned else meant
    assert loss(packed) == pytest.approx(loss(whole), abs=1e-4)
    held = weight_bytes(packed) - (weight_bytes(whole) - 4 * linear)
    assert held == pytest.approx(linear * FORMATS[quantise].bits / 8, rel=0.15)
    recipe |= {"model": str(folder)}
    recipe["train"]["quantise"] = quantise
    planned = tunesmith("plan", write_recipe(tmp_path, recipe), "--json").json["memory"]["weights"]
    assert planned == pytest.approx(weight_bytes(packed) + 4 * 512 * 128, rel=0.15)


def test_an_adapter_over_a_quantised_gpt2_is_one_for_gpt2(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    recipe["model"] = str(make_model(tmp_path / "gpt2", architecture="gpt2"))
    recipe["train"] |= {"quantise": "nf4", "adapter": {"kind": "lora", "rank": 4, "targets": ["c_attn", "*.mlp.*"]}}
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("train", path)
    assert said.code == 0, said.err
    losses = [line["loss"] for line in read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")]
    assert min(losses[1:]) < losses[0]
    from tunesmith.models.load import load_model, load_tuned
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    base, adapter = resolve(ModelSection(name=recipe["model"])), tmp_path / "runs/tiny/train/adapter"
    assert loss(load_tuned(base, adapter, torch.float32)) != loss(load_model(base, torch.float32))
    said = tunesmith("train", path, "--set=train.adapter=oft", "--set=name=other")
    assert said.code == 2 and "oft does not suit this model" in said.err, said.err
    assert not (tmp_path / "runs/other/metrics.jsonl").exists()


@pytest.mark.parametrize("verb", ["check", "plan", "train"])
def test_a_base_that_would_stay_large_is_refused(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, verb: str
) -> None:
    recipe["model"] = str(make_model(tmp_path / "mixture", architecture="mixtral", num_local_experts=4))
    recipe["train"]["quantise"] = "nf4"
    said = tunesmith(verb, write_recipe(tmp_path, recipe))
    assert said.code == 2 and "train.quantise" in said.err and "a mixture's experts" in said.err, said.err


@pytest.mark.parametrize(
    ("adapter", "quantise", "part"),
    [
        ({"kind": "full"}, "nf4", "weights in so few bits take no gradient"),
        ({"kind": "partial", "last_layers": 1}, "int8", "weights in so few bits take no gradient"),
        ({"kind": "boft"}, "nf4", "quantised ones can't be turned"),
        ({"kind": "lora", "init": "pissa"}, "nf4", "take init loftq"),
        ({"kind": "lora", "init": "loftq"}, None, "nothing is quantised"),
    ],
)
def test_what_can_t_be_trained_on_a_quantised_base_is_said(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, adapter: dict[str, Any], quantise: str | None, part: str
) -> None:
    recipe["train"] |= {"adapter": adapter, "quantise": quantise}
    said = tunesmith("check", write_recipe(tmp_path, recipe))
    assert said.code == 2 and part in said.err, said.err


def test_loftq_starts_with_the_best_picture_of_what_quantising_lost(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from peft.utils.loftq_utils import _low_rank_decomposition

    from tunesmith.models.load import load_model
    from tunesmith.train.adapters.lora import Lora

    folder = Path(recipe["model"])
    plain = load_model(resolved(folder), torch.float32).model.layers[1].mlp.up_proj.weight
    model = Lora(rank=8, alpha=16, init="loftq").attach(
        load_model(resolved(folder), torch.float32, quantise="nf4", lost_rank=8)
    )
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    theirs = _low_rank_decomposition(plain - layer.base_layer.dequantize(), 8)
    ours = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert torch.allclose(ours, theirs["L"] @ theirs["R"], atol=1e-5) and ours.abs().max() > 0.01
    recipe["train"] |= {"adapter": {"kind": "lora", "rank": 4, "init": "loftq"}, "quantise": "nf4"}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    config = json.loads((tmp_path / "runs/tiny/train/adapter/adapter_config.json").read_text())
    assert config["r"] == 8 and config["init_lora_weights"] is True


def test_a_missing_library_is_named(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    from tunesmith.models import quantise

    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    recipe["train"]["quantise"] = "nf4"
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "pip install 'tunesmith[bitsandbytes]'" in said.err


@pytest.mark.parametrize("quantised", [False, True])
def test_weights_that_are_not_numbers_are_named(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, quantised: bool
) -> None:
    if quantised:
        pytest.importorskip("bitsandbytes")
        recipe["train"]["quantise"] = "int8"
    folder = tmp_path / "broken"
    shutil.copytree(recipe["model"], folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    recipe["model"] = str(folder)
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "not finite" in said.err and "layers.1.mlp.up_proj" in said.err
