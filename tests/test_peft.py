"""Adapters are PEFT's: losses and gradients on the same rows, whole trainings, and what they start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import plain
from tests.cells import ADAPTERS
from tests.conftest import make_model, write_recipe
from tests.test_packed import rows
from tunesmith.conversation.render import Rendered
from tunesmith.models.packed import PackedForward
from tunesmith.runs import read_jsonl
from tunesmith.train.section import TrainSection

CHAT: dict[str, Any] = {"task_type": "CAUSAL_LM"}
ALL: dict[str, Any] = CHAT | {"target_modules": "all-linear"}
WORDS = [60, 61]
# What PEFT is told by hand where a recipe says what tests/cells.py has under the same name.
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=8, **ALL),
    "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=32, use_rslora=True, **ALL),
    "dora": lambda: peft.LoraConfig(r=4, lora_alpha=32, use_dora=True, **ALL),
    "lora, pissa": lambda: peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="pissa", **ALL),
    "lora, olora": lambda: peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="olora", **ALL),
    "lora, words": lambda: peft.LoraConfig(r=4, lora_alpha=8, trainable_token_indices={"embed_tokens": WORDS}, **ALL),
    "adalora": lambda: peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=32, total_step=8, tinit=0, tfinal=0, deltaT=1, **ALL
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=8, **ALL),
    "lokr": lambda: peft.LoKrConfig(r=4, alpha=8, **ALL),
    "vera": lambda: peft.VeraConfig(r=8, **ALL),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, **ALL),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **ALL),
    "ia3": lambda: peft.IA3Config(**CHAT),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=WORDS, **CHAT),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB", **CHAT),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32, **CHAT),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **CHAT),
}
RECIPES = ADAPTERS | {"lora, words": ADAPTERS["lora"]}


def base_of(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def attached(folder: Path, adapter: dict[str, Any], words: bool = False) -> Any:
    """Our adapter on a model, and its section."""
    section = TrainSection(adapter=adapter).adapter
    base = base_of(folder)
    if words:
        base.new_word_ids = WORDS
    torch.manual_seed(7)
    return section.attach(base), section


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_give_pefts_losses_and_gradients(tiny_model: Path, name: str) -> None:
    """Away from the start, where half of an adapter's weights are zero."""
    model, section = attached(tiny_model, RECIPES[name], words=name in ("tokens", "lora, words"))
    theirs = peft.get_peft_model(base_of(tiny_model), CONFIGS[name]())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.load_state_dict(model.state_dict(), strict=name not in ("prompt", "p-tuning"))
    expected = {n: p for n, p in theirs.named_parameters() if p.requires_grad and ".ranknum" not in n}
    assert set(trained) == set(expected) and trained

    given = rows(12)
    given[3].ids[20:24] = [60, 61, 60, 60]
    assert all(0 in row.weights for row in given)
    forward = PackedForward(model, given)
    assert forward.packed == (name != "prefix"), forward.why
    found = forward.nll(forward.pack(given)).sum()
    total = torch.stack([plain.nll(theirs, row.ids, plain.labels(row)) for row in given]).sum()
    if name == "adalora":  # PEFT adds to each row's mean how far A and B are from orthogonal
        section.regularise(model)
        count = sum(row.trained for row in given)
        own = torch.stack([a.norm() for a in orthogonality(theirs)]).mean() * 0.5
        torch.testing.assert_close(total - count * own, found, rtol=1e-5, atol=1e-4)
        total = total - (count - 1) * own
    else:
        torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-4)
    found.backward()
    total.backward()
    for key, parameter in expected.items():
        assert parameter.grad is not None and parameter.grad.any(), key
        size = parameter.grad.abs().max().item()
        torch.testing.assert_close(trained[key].grad, parameter.grad, rtol=1e-3, atol=1e-5 * size + 1e-5, msg=key)


def orthogonality(model: Any) -> list[torch.Tensor]:
    """A A^T - 1 and B^T B - 1 of every layer."""
    found = [p @ p.T for n, p in model.named_parameters() if "lora_A" in n]
    found += [p.T @ p for n, p in model.named_parameters() if "lora_B" in n]
    return [square - torch.eye(len(square)) for square in found]


@pytest.mark.parametrize("name", ["dora", "lora, pissa", "lora, olora", "adalora", "vera", "oft", "prefix", "prompt"])
def test_a_plain_loop_with_peft_trains_the_same_adapter(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """From the same start through eight steps; AdaLoRA with its ranks falling."""
    recipe["train"] |= {"adapter": RECIPES[name], "max_steps": 8, "epochs": 3, "keep_best": False}
    recipe["train"] |= {"learning_rate": 0.003, "validate_every": 99}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    run = tmp_path / "runs/tiny"
    after = (lambda model, step: model.base_model.update_and_allocate(step)) if name == "adalora" else None
    theirs = plain.train(
        Path(recipe["model"]),
        CONFIGS[name](),
        read_jsonl(run / "data/train.jsonl"),
        steps=8,
        batch_size=4,
        epochs=3,
        rate=0.003,
        **({"after_step": after} if after else {}),
    )
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["grad_norm"] for line in lines] == pytest.approx(theirs.norms, rel=2e-3)
    if name != "adalora":  # whose loss PEFT tells with the orthogonality
        assert [line["loss"] for line in lines] == pytest.approx(theirs.losses, rel=2e-4)
    if name in ("lora, pissa", "lora, olora"):  # saved for the base as it was, so compared once merged
        saved = peft.PeftModel.from_pretrained(base_of(Path(recipe["model"])), str(run / "train/adapter"))
        ours, expected = (model.merge_and_unload().state_dict() for model in (saved, theirs.model))
    else:
        ours, expected = load_file(run / "train/adapter/adapter_model.safetensors"), saved_state(theirs.model)
    assert set(ours) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(ours[key], tensor, rtol=5e-3, atol=5e-5, msg=key)


def saved_state(model: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(model)
    return found


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_pissa_and_olora_start_from_the_bases_own_directions(tiny_model: Path, name: str) -> None:
    """B A is W's best picture of its rank (pissa), or the first columns of its QR (olora); W is left with the rest."""
    model, _ = attached(tiny_model, ADAPTERS[f"lora, {name}"])
    base = load_file(tiny_model / "model.safetensors")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert len(layers) == 14
    for path, layer in layers.items():
        w = base[path.removeprefix("base_model.model.") + ".weight"].double().numpy()
        if name == "pissa":
            u, s, v = np.linalg.svd(w, full_matrices=False)
            start = (u[:, :4] * s[:4]) @ v[:4]
        else:
            q, r = np.linalg.qr(w)
            start = q[:, :4] @ r[:4]
        given = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]).detach()
        np.testing.assert_allclose(given, start, atol=1e-4)
        np.testing.assert_allclose(given + layer.base_layer.weight, w, atol=1e-5)


def test_eva_starts_from_what_rows_send_into_a_layer(tiny_model: Path) -> None:
    """A's rows span the directions in which a layer's inputs spread the most; B is zero, so the model is as it was."""
    random = torch.Generator().manual_seed(5)
    given = [
        Rendered(torch.randint(3, 200, (n,), generator=random).tolist(), [1.0] * n) for n in (30, 31, 33, 40)
    ]  # one batch
    model, section = attached(tiny_model, ADAPTERS["lora, eva"])
    section.begin(model, given, 4)
    seen: dict[str, list[torch.Tensor]] = {}
    base = base_of(tiny_model)
    for path, module in base.named_modules():
        module.register_forward_hook(lambda _, x, out, path=path: seen.setdefault(path, []).append(x[0]) if x else None)
    with torch.no_grad():
        for row in given:
            base(torch.tensor([row.ids]))
    for path, layer in ((n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")):
        x = torch.cat([x[0] for x in seen[path.removeprefix("base_model.model.")]]).double().numpy()
        _, _, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
        a, _ = np.linalg.qr(layer.lora_A["default"].weight.detach().double().numpy().T)
        assert np.linalg.svd(v[:4] @ a)[1].min() > 0.98, path
        assert not layer.lora_B["default"].weight.any()


def test_experts_of_a_mixture_are_pefts(tmp_path: Path) -> None:
    folder = make_model(tmp_path, architecture="mixtral", num_local_experts=4, num_experts_per_tok=2)
    model, _ = attached(folder, {"kind": "lora", "rank": 2, "alpha": 4, "targets": ["experts"]})
    names = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    theirs = peft.get_peft_model(
        base_of(folder), peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=names, **CHAT)
    )
    torch.manual_seed(3)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1 * torch.randn_like(parameter)
    theirs.load_state_dict(model.state_dict())
    forward = PackedForward(model, rows())
    assert "2 LoRA experts" in forward.why
    found = forward.nll(forward.pack(rows())).sum()
    total = torch.stack([plain.nll(theirs, row.ids, plain.labels(row)) for row in rows()]).sum()
    torch.testing.assert_close(found, total, rtol=1e-5, atol=1e-4)
    found.backward()
    total.backward()
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[key].grad, parameter.grad, rtol=1e-3, atol=1e-3, msg=key)
