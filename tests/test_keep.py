"""Terms against forgetting: their values and gradients against what is written out, and through a recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import make_model, write_jsonl, write_recipe
from tunesmith.runs import read_jsonl
from tunesmith.scores import number


def general(folder: Path, n: int = 8) -> str:
    rows = [{"prompt": f"Say {i} in words", "completion": f"the number {i}"} for i in range(n)]
    return str(write_jsonl(folder / "general.jsonl", rows))


def start_of(tiny_model: Path, full: bool) -> Any:
    from transformers import AutoModelForCausalLM

    from tunesmith.conversation.render import Rendered
    from tunesmith.models.packed import PackedForward
    from tunesmith.train.adapters.full import Full
    from tunesmith.train.adapters.lora import Lora
    from tunesmith.train.keep.terms import Start

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = (Full() if full else Lora(rank=4)).attach(model)
    rows = [Rendered(list(range(5 + i, 25 + 2 * i)), [0.0] * 10 + [1.0] * (10 + i)) for i in range(5)]
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return Start(PackedForward(model, rows), weights, {"general": rows}, seed=7)


def move(start: Any) -> list[torch.Tensor]:
    """Move every weight a little, give it a zero gradient, and return by how much it moved."""
    torch.manual_seed(1)
    steps = []
    with torch.no_grad():
        for w in start.weights.values():
            steps.append(0.02 * torch.randn_like(w))
            w.add_(steps[-1])
            w.grad = torch.zeros_like(w)
    return steps


def test_l2_is_the_distance_from_the_start(tiny_model: Path) -> None:
    from tunesmith.train.keep.sections import L2

    start = start_of(tiny_model, full=True)
    term, steps = L2(weight=0.3).begin(start), move(start)
    assert term.add(0) == pytest.approx(0.5 * sum(s.square().sum().item() for s in steps), rel=1e-3)
    for w, step in zip(start.weights.values(), steps, strict=True):
        torch.testing.assert_close(w.grad, 0.3 * step, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("full", [True, False])
def test_ewc_weighs_by_the_squared_gradients_of_single_rows(tiny_model: Path, full: bool) -> None:
    """The Fisher information from transformers' own loss, a row at a time."""
    from tunesmith.train.keep.sections import Ewc

    start = start_of(tiny_model, full)
    rows, weights = start.general["general"], list(start.weights.values())
    term = Ewc(rows="general", weight=2.0).begin(start)
    assert all(w.grad is None for w in weights)
    fisher = [torch.zeros_like(w) for w in weights]
    model = start.forward.model
    model.set_attn_implementation("eager")
    for row in rows:
        labels = [t if w else -100 for t, w in zip(row.ids, row.weights, strict=True)]
        loss = model(torch.tensor([row.ids]), labels=torch.tensor([labels])).loss * row.trained
        for f, g in zip(fisher, torch.autograd.grad(loss, weights), strict=True):
            f += g.square() / len(rows)
    model.set_attn_implementation(start.forward.attention)
    steps = move(start)
    value = sum((f * s.square()).sum().item() for f, s in zip(fisher, steps, strict=True)) / 2
    assert value > 0
    assert term.add(0) == pytest.approx(value, rel=1e-3)
    for w, f, step in zip(weights, fisher, steps, strict=True):
        torch.testing.assert_close(w.grad, 2.0 * f * step, rtol=1e-2, atol=1e-4 * f.max().item())


@pytest.mark.parametrize("full", [True, False])
def test_kl_is_torchs_and_zero_at_the_start(tiny_model: Path, full: bool) -> None:
    from transformers import AutoModelForCausalLM

    from tunesmith.train.keep.sections import Kl

    start = start_of(tiny_model, full)
    rows, weights = start.general["general"], list(start.weights.values())
    term = Kl(rows="general", weight=0.5, batch_size=5).begin(start)
    assert term.add(0) == pytest.approx(0, abs=1e-6)
    move(start)
    value = term.add(1)
    given = [w.grad.clone() for w in weights]
    base, model = AutoModelForCausalLM.from_pretrained(tiny_model), start.forward.model
    model.set_attn_implementation("eager")
    parts = []
    for row in rows:
        ids, at = torch.tensor([row.ids]), [i - 1 for i, w in enumerate(row.weights) if w]
        with torch.no_grad():
            then = F.log_softmax(base(ids).logits[0, at], -1)
        now = F.log_softmax(model(ids).logits[0, at], -1)
        parts.append(F.kl_div(now, then, log_target=True, reduction="none").sum(-1))
    expected = torch.cat(parts).mean()
    assert value == pytest.approx(expected.item(), rel=1e-3) and value > 1e-3
    for mine, theirs in zip(given, torch.autograd.grad(0.5 * expected, weights), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    "adapter", [{"kind": "lora", "rank": 4, "dropout": 0.1}, {"kind": "partial", "last_layers": 1}]
)
def test_terms_hold_the_model_are_shown_and_go_on_bit_for_bit(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, adapter: dict[str, Any]
) -> None:
    rows = general(tmp_path)
    recipe["train"] |= {"adapter": adapter, "keep_best": False, "optimizer": "sgd", "learning_rate": 0.02}
    free = [{"kind": "l2", "weight": 1e-9}, {"kind": "ewc", "rows": rows, "weight": 1e-9}]
    free.append({"kind": "kl", "rows": rows, "weight": 1e-9})
    held = [term | {"weight": weight} for term, weight in zip(free, (1, 10, 2), strict=True)]
    last = {}
    for name, terms in (("free", free), ("tiny", held)):
        recipe |= {"name": name, "train": recipe["train"] | {"keep": terms}}
        path = write_recipe(tmp_path, recipe, f"{name}.yaml")
        assert tunesmith("run", path).code == 0
        last[name] = read_jsonl(tmp_path / f"runs/{name}/metrics.jsonl")[-1]
    for figure in ("keep_l2", "keep_ewc", "keep_kl"):
        assert 0 < last["tiny"][figure] < last["free"][figure]
    run = tmp_path / "runs/tiny"
    summary = json.loads((run / "train/manifest.json").read_text())["summary"]
    assert summary["keep"] == {k: v for k, v in last["tiny"].items() if k.startswith("keep_")}
    shown = " ".join((run / "report.html").read_text().split())
    for title, figure in {
        "From the start: half the squared distance": "keep_l2",
        "From the start, by Fisher information": "keep_ewc",
        "KL to the start, nats per token": "keep_kl",
    }.items():
        assert title in shown and f"{figure} {number(last['tiny'][figure])}" in shown

    made = next(run.glob("train/*/*model.safetensors"))
    whole = made.read_bytes()
    for old in (made.parent, run / "train/checkpoints/step-000006"):
        shutil.rmtree(old)
    (run / "train/manifest.json").unlink()
    said = tunesmith("train", path)
    assert said.code == 0 and "Going on from step 4" in said.err
    assert made.read_bytes() == whole
    Path(rows).write_text(Path(rows).read_text().replace("Say", "Tell"))
    assert "up to date" not in tunesmith("train", path).err.replace("data: up to date", "")


def test_models_that_go_row_by_row_are_held_too(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["model"] = str(make_model(tmp_path / "mamba", architecture="mamba", head_dim=8))
    recipe["train"]["adapter"]["targets"] = ["in_proj", "x_proj"]
    recipe["train"] |= {"keep": [{"kind": "kl", "rows": general(tmp_path)}], "max_steps": 2}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    found = [line["keep_kl"] for line in read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")]
    assert found[0] == pytest.approx(0, abs=1e-6) and found[1] > found[0]


def test_the_rows_of_a_term_are_those_that_it_names(recipe: dict[str, Any], tmp_path: Path) -> None:
    """And not the recipe's own; neither mixed nor added to as those are."""
    from tunesmith.kit import Kit
    from tunesmith.recipe import build
    from tunesmith.runs import Run

    recipe["data"]["sources"][0]["tag"] = "mine"
    recipe["data"] |= {"mix": {"mine": 1.0}, "canaries": 2, "augment": ["typos"]}
    recipe["train"]["keep"] = [{"kind": "ewc", "rows": general(tmp_path)}]
    kit = Kit(build(recipe), tmp_path, Run(tmp_path / "run"))
    ((path, rows),) = kit.general().items()
    assert path == str(tmp_path / "general.jsonl")
    assert [row.answer for row in rows] == [f"the number {i}" for i in range(8)]


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ({"kind": "l3"}, ["train.keep.0", "no keep is called 'l3'", "known: ewc, kl, l2"]),
        ({"kind": "kl"}, ["train.keep.0.rows", "is missing"]),
        ({"kind": "l2", "wieght": 1}, ["train.keep.0.wieght", "did you mean 'weight'"]),
        ({"kind": "ewc", "rows": "nowhere.jsonl"}, ["train.keep", "no such file", "nowhere.jsonl"]),
        ({"kind": "ewc", "rows": "empty.jsonl"}, ["empty.jsonl", "holds no rows"]),
        ({"kind": "kl", "rows": "pairs.jsonl"}, ["pairs.jsonl:1", "this is a preference row", "train.keep"]),
    ],
)
def test_wrong_terms_are_said(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, term: dict[str, Any], parts: list[str]
) -> None:
    write_jsonl(tmp_path / "empty.jsonl", [])
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "2+2?", "chosen": "4", "rejected": "5"}] * 3)
    recipe["train"]["keep"] = [term]
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "Traceback" not in said.err
    for part in parts:
        assert part in said.err.replace("\n", " "), said.err
