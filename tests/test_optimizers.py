"""Optimizers and what is trained when: equal to their references, and exact when stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import make_model, write_recipe
from tunesmith.runs import read_jsonl

FULL = {"kind": "full"}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "adafactor": {"optimizer": "adafactor", "learning_rate": 1.0},
    "sgd": {"optimizer": {"kind": "sgd", "nesterov": True}, "learning_rate": 0.05},
    "lion": {"optimizer": "lion", "learning_rate": 0.002},
    "muon": {"optimizer": {"kind": "muon", "momentum": 0.9}},
    "muon, all weights": {"optimizer": "muon", "adapter": FULL},
    "schedule_free": {"optimizer": "schedule_free"},
    "adamw_8bit": {"optimizer": "adamw_8bit", "adapter": FULL},
    "galore": {"optimizer": {"kind": "galore", "rank": 4, "every": 3}, "adapter": FULL},
    "layer_decay": {"layer_decay": 0.8, "adapter": FULL},
    "unfreezing": {"adapter": {"kind": "full", "unfreeze_every": 2}},
    "lisa": {"adapter": {"kind": "full", "lisa": {"layers": 1, "every": 2}}},
    "neftune": {"neftune": 5},
    "smoothing": {"method": {"kind": "sft", "label_smoothing": 0.1}},
}


def made(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for name in ("adapter", "model") for p in (run / "train" / name).glob("*.safeten*")}


@pytest.mark.parametrize("name", CASES)
def test_each_trains_and_goes_on_bit_for_bit(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, name: str) -> None:
    recipe["train"] |= {"max_steps": 8, "epochs": 3, "checkpoint_every": 5, "learning_rate": 0.003} | CASES[name]
    recipe["train"] |= {"validate_every": 3, "keep_checkpoints": 5}
    path, run = write_recipe(tmp_path, recipe), tmp_path / "runs/tiny"
    assert tunesmith("train", path).code == 0
    whole, lines = made(run), read_jsonl(run / "metrics.jsonl")
    assert lines[-1]["validation_loss"] < lines[2]["validation_loss"]
    for folder in ("adapter", "model", "checkpoints/step-000008"):
        shutil.rmtree(run / "train" / folder, ignore_errors=True)
    (run / "train/manifest.json").unlink()
    said = tunesmith("train", path)
    assert said.code == 0 and "Going on from step 5" in said.err
    assert made(run) == whole
    kept = ("step", "loss", "grad_norm", "validation_loss")
    again = read_jsonl(run / "metrics.jsonl")
    assert [[line.get(k) for k in kept] for line in again] == [[line.get(k) for k in kept] for line in lines]


def steps(name: str, keys: dict[str, Any], reference: Any, hidden: bool = True) -> tuple[Any, Any]:
    """Six steps of ours and of a reference on the same gradients: a matrix and a vector each."""
    from tunesmith import plugins

    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(24, 16)), torch.nn.Parameter(torch.randn(16))]
    theirs = [torch.nn.Parameter(w.detach().clone()) for w in ours]
    groups = [
        {"params": [ours[0]], "weight_decay": 0.1, "share": 1.0, "hidden": hidden},
        {"params": [ours[1]], "weight_decay": 0.0, "share": 1.0, "hidden": False},
    ]
    optimizer = plugins.load("optimizer", name)(kind=name, **keys).build(groups, 0.01)
    others = reference(theirs)
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        for each in [optimizer, *others]:
            each.step()
    for each in [optimizer, *others]:
        if hasattr(each, "eval"):
            each.eval()
    return ours, theirs


def decayed(weights: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]


def test_lion_is_the_published_one() -> None:
    from pytorch_optimizer import Lion

    ours, theirs = steps("lion", {}, lambda w: [Lion(decayed(w), lr=0.01, betas=(0.9, 0.99))])
    torch.testing.assert_close(ours, theirs)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest() -> None:
    def reference(w: list[torch.nn.Parameter]) -> list[Any]:
        muon = torch.optim.Muon(w[:1], 0.01, 0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(w[1:], 0.01, weight_decay=0.0)]

    ours, theirs = steps("muon", {}, reference)
    torch.testing.assert_close(ours, theirs)
    ours, theirs = steps("muon", {}, lambda w: [torch.optim.AdamW(decayed(w), 0.01)], hidden=False)
    torch.testing.assert_close(ours, theirs)


def test_schedule_free_equals_another_implementation() -> None:
    from pytorch_optimizer import ScheduleFreeAdamW

    def reference(w: list[torch.nn.Parameter]) -> list[Any]:
        made = ScheduleFreeAdamW(decayed(w), lr=0.01, betas=(0.9, 0.999))
        made.train()
        return [made]

    ours, theirs = steps("schedule_free", {}, reference)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_eight_bits_stay_near_adamw() -> None:
    from tunesmith.train.optimizers.sections import AdamW8bit

    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(128, 64))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    pair = [
        AdamW8bit().build([{"params": [ours], "weight_decay": 0.1, "share": 1.0}], 0.01),
        torch.optim.AdamW([theirs], 0.01, weight_decay=0.1),
    ]
    for _ in range(10):
        ours.grad = torch.randn(ours.shape)
        theirs.grad = ours.grad.clone()
        for each in pair:
            each.step()
    assert (ours - theirs).norm() < 0.05 * (theirs - start).norm()
    state = pair[0].state[ours]
    assert sum(v.numel() * v.element_size() for k, v in state.items() if "state" in k) == 2 * ours.numel()


def test_galore_is_adamw_in_the_view_of_the_gradients_first_singular_vectors() -> None:
    """Zhao et al. 2024, algorithm 2, written out."""
    from tunesmith.train.optimizers.sections import GaLore

    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(24, 16))
    w, m, v, basis = ours.detach().clone(), 0.0, 0.0, None
    optimizer = GaLore(rank=4, every=2, scale=0.25).build(
        [{"params": [ours], "weight_decay": 0.0, "share": 1.0, "hidden": True}], 0.01
    )
    for t in range(1, 6):
        ours.grad = torch.randn(24, 16)
        if basis is None or t % 2 == 0:
            basis = torch.linalg.svd(ours.grad, full_matrices=False)[2][:4]
        low = ours.grad @ basis.T
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low * low
        corrected = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w - 0.01 * 0.25 * corrected @ basis
        optimizer.step()
    torch.testing.assert_close(ours.detach(), w, rtol=1e-4, atol=1e-5)


def test_scales_are_not_decayed_and_lower_layers_learn_slower() -> None:
    from tunesmith.train.optimizers.make import make
    from tunesmith.train.section import TrainSection

    names = [
        "embed.weight",
        "layers.0.w",
        "layers.0.norm",
        "layers.1.w",
        "layers.1.ia3_l",
        "layers.1.lora_E.default",
        "norm.weight",
        "head.w",
    ]
    shapes = [(9, 4), (4, 4), (4,), (4, 4), (4, 1), (3, 1), (4,), (9, 4)]
    weights = {n: torch.nn.Parameter(torch.zeros(s)) for n, s in zip(names, shapes, strict=True)}
    optimizer = make(TrainSection(weight_decay=0.1, layer_decay=0.5), weights, lambda name: 1.0)
    told = {
        n: (g["weight_decay"], g["share"], g["hidden"])
        for g in optimizer.param_groups
        for n, w in weights.items()
        if any(w is p for p in g["params"])
    }
    assert told == {
        "embed.weight": (0.1, 0.125, False),
        "layers.0.w": (0.1, 0.25, True),
        "layers.0.norm": (0.0, 0.25, False),
        "layers.1.w": (0.1, 0.5, True),
        "layers.1.ia3_l": (0.0, 0.5, False),
        "layers.1.lora_E.default": (0.0, 0.5, False),
        "norm.weight": (0.0, 1.0, False),
        "head.w": (0.1, 1.0, False),
    }


def moved(recipe: dict[str, Any], run: Path) -> set[str]:
    before = load_file(Path(recipe["model"]) / "model.safetensors")
    after = load_file(run / "train/model/model.safetensors")
    return {name for name in before if not torch.equal(before[name], after[name])}


def places(names: set[str]) -> set[str]:
    return {n.split(".")[2] if ".layers." in n else n.split(".")[-2] for n in names}


def test_layers_open_one_by_one_from_the_top(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["model"] = str(make_model(tmp_path / "four", num_hidden_layers=4, tie_word_embeddings=False))
    recipe["train"] |= {"adapter": {"kind": "full", "unfreeze_every": 2}, "epochs": 5, "keep_best": False}
    expected = {2: {"3", "norm", "lm_head"}, 5: {"1", "2", "3", "norm", "lm_head"}}
    expected[10] = {"0", "embed_tokens"} | expected[5]
    for steps_taken, there in expected.items():
        recipe |= {"name": f"run{steps_taken}", "train": recipe["train"] | {"max_steps": steps_taken}}
        assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
        assert places(moved(recipe, tmp_path / f"runs/run{steps_taken}")) == there


def test_lisa_trains_drawn_layers_and_forgets_the_others_state(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["model"] = str(make_model(tmp_path / "four", num_hidden_layers=4))
    recipe["train"] |= {"adapter": {"kind": "full", "lisa": {"layers": 2, "every": 3}}, "keep_best": False}
    drawn = []
    for steps_taken in (3, 6):
        recipe |= {"name": f"run{steps_taken}", "train": recipe["train"] | {"max_steps": steps_taken}}
        assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
        drawn.append(places(moved(recipe, tmp_path / f"runs/run{steps_taken}")))
        held = load_file(tmp_path / f"runs/run{steps_taken}/train/checkpoints/step-{steps_taken:06d}/state.safetensors")
        kept = {n.split(".layers.")[1][0] for n in held if n.startswith("optimizer/") and ".layers." in n}
        assert len(kept) == 2
    assert drawn[0] < drawn[1] and len(drawn[0] & set("0123")) == 2 and {"norm", "embed_tokens"} <= drawn[0]


def test_schedule_free_keeps_the_averages(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """x = y + (1 - 1 / b1) (z - y), of the y and z that the last checkpoint holds; and no schedule but a constant."""
    recipe["train"] |= {"optimizer": {"kind": "schedule_free", "betas": [0.8, 0.99]}, "keep_best": False}
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path).code == 0
    held = load_file(tmp_path / "runs/tiny/train/checkpoints/step-000006/state.safetensors")
    saved = load_file(tmp_path / "runs/tiny/train/adapter/adapter_model.safetensors")
    for name, tensor in saved.items():
        whole = name.replace(".weight", ".default.weight")
        y, z = held[f"weight/{whole}"], held[f"optimizer/z/{whole}"]
        assert not torch.equal(y, tensor)
        torch.testing.assert_close(tensor, y + (1 - 1 / 0.8) * (z - y))
    rates = [line["learning_rate"] for line in read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")]
    assert len(set(rates[1:])) == 1
    said = tunesmith("train", path, "--set", "train.schedule=cosine")
    assert said.code == 2 and "schedule_free wants schedule constant" in said.err


def test_validating_more_often_changes_nothing(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["train"] |= {"optimizer": "schedule_free", "keep_best": False, "neftune": 5}
    for name, often in (("seldom", 6), ("often", 1)):
        recipe |= {"name": name, "train": recipe["train"] | {"validate_every": often}}
        assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    assert made(tmp_path / "runs/seldom") == made(tmp_path / "runs/often")


@pytest.mark.parametrize("packed", [True, False])
def test_neftunes_noise_is_of_each_rows_size(tiny_model: Path, packed: bool) -> None:
    from transformers import AutoModelForCausalLM

    from tunesmith.conversation.render import Rendered
    from tunesmith.models.packed import PackedForward
    from tunesmith.train.neftune import add_noise

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = [Rendered(list(range(5, 5 + n)), [0.0, *[1.0] * (n - 1)]) for n in (40, 10)]
    forward = PackedForward(model, rows)
    forward.packed = packed
    layer, seen = model.get_input_embeddings(), []
    add_noise(forward, 5.0)
    layer.register_forward_hook(lambda m, given, out: seen.append(out[0] - m.weight[given[0][0]]))
    batch = forward.pack(rows)
    model.train()
    forward.nll(batch)
    noise = torch.cat(seen).detach()
    for part, length in zip(noise.split([40, 10]), (40, 10), strict=True):
        limit = 5 / (length * 32) ** 0.5
        assert 0.9 * limit < part.abs().max() <= limit * 1.0001
    seen.clear()
    model.eval()
    forward.nll(batch)
    assert not torch.cat(seen).any()


def test_neftune_trains_in_bfloat16(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Whose packs are filled up to sizes that come again: what fills them is no row, and gets no noise."""
    recipe["train"] |= {"precision": "bfloat16", "neftune": 5, "max_steps": 2}
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 0 and len(read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")) == 2, said.err


@pytest.mark.parametrize("trained", [False, True])
def test_label_smoothing_is_torchs(trained: bool) -> None:
    from tunesmith.models.head import head_nll

    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50).requires_grad_(trained)
    hidden, targets = torch.randn(300, 8, requires_grad=True), torch.randint(50, (300,))
    weight = torch.rand(300)
    ours = head_nll(hidden, head, targets, 0.1)
    theirs = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs)
    wanted = [hidden, *head.parameters()] if trained else [hidden]
    mine = torch.autograd.grad((ours * weight).sum(), wanted)
    torch.testing.assert_close(mine, torch.autograd.grad((theirs * weight).sum(), wanted), rtol=1e-4, atol=1e-6)


def test_nothing_below_the_first_trained_layer_is_kept(tmp_path: Path) -> None:
    """What autograd saves for backward: as much for one trained layer of six as for one of two."""
    from transformers import AutoModelForCausalLM

    from tunesmith.conversation.render import Rendered
    from tunesmith.models.packed import PackedForward
    from tunesmith.train.adapters.full import Partial

    def saved(layers: int, last: int) -> int:
        model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / f"m{layers}", num_hidden_layers=layers))
        model = Partial(last_layers=last).attach(model)
        rows = [Rendered(list(range(5, 45)), [0.0, *[1.0] * 39])] * 2
        forward, own, kept = PackedForward(model, rows), {p.data_ptr() for p in model.parameters()}, []

        def count(t: torch.Tensor) -> torch.Tensor:
            kept.append(0 if t.data_ptr() in own else t.numel() * t.element_size())
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = forward.nll(forward.pack(rows)).sum()
        loss.backward()
        assert forward.packed
        return sum(kept)

    assert saved(6, 1) == saved(2, 1) < saved(6, 2) == saved(4, 2)


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"optimizer": "paged_adamw"}, ["train.optimizer", "there is no GPU", "adamw_8bit"]),
        ({"optimizer": "adamv"}, ["train.optimizer", "did you mean 'adamw'"]),
        ({"optimizer": {"kind": "muon", "momentun": 1}}, ["train.optimizer.momentun", "unknown key", "momentum"]),
        ({"adapter": {"kind": "full", "lisa": {}, "unfreeze_every": 3}}, ["train.adapter", "exclude each other"]),
        ({"layer_decay": 0}, ["train.layer_decay", "greater than 0"]),
    ],
)
def test_what_can_not_be_is_said(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, keys: dict[str, Any], parts: list[str]
) -> None:
    recipe["train"] |= keys
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "Traceback" not in said.err
    for part in parts:
        assert part in said.err.replace("\n", " "), said.err


def test_a_missing_package_is_named_with_its_extra(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.train.optimizers import sections

    monkeypatch.setattr(sections, "find_spec", lambda name: None)
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--set", "train.optimizer=schedule_free")
    assert said.code == 2 and "tunesmith[optimizers]" in said.err


def test_plan_counts_each_optimizers_state(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """The state's bytes as planned, and as the checkpoint holds them; also where layers are trained in turns."""
    turns = {"lisa": {"lisa": {"layers": 1}}, "unfreezing": {"unfreeze_every": 2}}
    recipe["train"] |= {"max_steps": 1}
    for kind in ("adamw", "adafactor", "lion", "muon", "schedule_free", "galore", *turns):
        recipe["train"]["adapter"] = {"kind": "full"} | turns.get(kind, {})
        name = "adamw" if kind in turns else kind
        recipe["train"]["optimizer"] = {"kind": name} | ({"rank": 4} if kind == "galore" else {})
        recipe |= {"name": kind}
        path = write_recipe(tmp_path, recipe)
        planned = tunesmith("plan", path, "--json").json["memory"]["optimizer"]
        assert tunesmith("train", path).code == 0
        held = load_file(tmp_path / f"runs/{kind}/train/checkpoints/step-000001/state.safetensors")
        found = sum(t.numel() * t.element_size() for n, t in held.items() if n.startswith("optimizer/") and t.ndim)
        assert planned == pytest.approx(found, rel=0.05), kind
        assert json.loads((tmp_path / f"runs/{kind}/train/manifest.json").read_text())["summary"]["steps"] == 1
