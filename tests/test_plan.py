"""What is foretold: whether it fits, what to change if not, and what is said when memory runs out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import make_model, write_recipe
from tunesmith.models.machine import Machine
from tunesmith.models.plan import Job, Shape, advise, estimate, peak_memory, told
from tunesmith.train.section import TrainSection

SHAPE = Shape(135_000_000, 28_000_000, 576, 1536, 30, 49_152, {f"layer.{i}": (576, 1536) for i in range(210)})
JOB = Job(SHAPE, "float32", 5_000_000, 5_000_000, [200] * 90 + [900] * 10, 0, 10_000, 60, 3.0, 16, 4096)
HERE = Machine("", 2, "cpu", "bfloat16", {"float32": 100.0, "bfloat16": 400.0}, None)


def test_a_plan_that_fits_advises_nothing() -> None:
    plan = estimate(JOB, HERE, 100 * 2**30)
    assert plan.fits and plan.changes == []
    assert plan.peak_bytes == sum(peak_memory(JOB).values())


def test_the_cheapest_change_comes_first_and_is_enough() -> None:
    peak = sum(peak_memory(JOB).values())
    plan = estimate(JOB, HERE, round(0.8 * peak))
    first = plan.changes[0]
    assert not plan.fits and list(first.settings) == ["train.pack_tokens"] and first.fits
    with_it = replace(JOB, pack_tokens=first.settings["train.pack_tokens"])
    assert sum(peak_memory(with_it).values()) == first.peak_bytes <= plan.available_bytes
    assert first.settings["train.pack_tokens"] >= max(JOB.lengths)
    said = told(plan.changes)
    assert said.startswith("Cheapest change first: --set train.pack_tokens=") and "the result stays the same" in said


def test_what_no_setting_makes_fit_needs_a_smaller_model() -> None:
    changes = advise(JOB, 2**20)
    assert changes and not any(change.fits for change in changes)
    assert changes[-1].costs == "all of these"
    assert changes[-1].peak_bytes <= min(change.peak_bytes for change in changes[:-1])
    assert "smaller base model" in told(changes)


def test_training_every_weight_is_advised_against_only_where_it_does_not_fit() -> None:
    full = replace(JOB, trained=135_000_000, added=0)
    changes = advise(full, round(0.5 * sum(peak_memory(full).values())))
    settings = [change.settings for change in changes]
    assert {"train.adapter": "lora"} in settings and {"train.optimizer": "adafactor"} in settings
    assert not any("train.adapter" in change.settings for change in advise(JOB, 2**20))


def test_nothing_is_kept_below_the_first_layer_that_is_trained(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """As what autograd really keeps: that of two layers of four, of none where only the head is trained."""
    from transformers import AutoModelForCausalLM

    from tunesmith.conversation.render import Rendered
    from tunesmith.models.packed import PackedForward

    folder = make_model(tmp_path / "deep", num_hidden_layers=4, tie_word_embeddings=False)
    recipe["model"] = str(folder)
    planned, kept = {}, {}
    rows = [Rendered(list(range(5, 60)), [0.0] * 20 + [1.0] * 35)] * 2
    for name, asked in {
        "all": "{kind: partial, last_layers: 4}",
        "two": "{kind: partial, last_layers: 2}",
        "one": "{kind: partial, names: ['*.layers.3.mlp.*', 'lm_head.*']}",
        "head": "{kind: partial, names: ['lm_head.*']}",
        "embeddings": "{kind: partial, only: embeddings}",
        "lora": "{kind: lora, rank: 2, targets: ['*.layers.3.*']}",
        "virtual": "{kind: prompt, tokens: 4}",
    }.items():
        said = tunesmith("plan", write_recipe(tmp_path, recipe), "--set", f"train.adapter={asked}", "--json").json
        planned[name] = said["memory"]["activations"]
        adapter = TrainSection.model_validate({"adapter": yaml.safe_load(asked)}).adapter
        model = adapter.attach(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        forward = PackedForward(model, rows)
        sizes: dict[int, int] = {}

        def count(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            forward.nll(forward.pack(rows))
        own = {p.data_ptr() for p in model.parameters()}
        kept[name] = sum(size for at, size in sizes.items() if at not in own)
    assert planned["all"] == planned["embeddings"] == planned["virtual"] == 2 * planned["two"] == 4 * planned["one"]
    assert planned["one"] == planned["lora"] == planned["head"]  # one layer's own, while it is computed
    head = kept["head"]
    assert 0.9 < (kept["two"] - head) / (kept["all"] - head) * 2 < 1.1
    assert kept["one"] - head < 0.3 * (kept["all"] - head) and kept["embeddings"] > 0.8 * kept["all"]


def test_less_time_is_foretold_where_gradients_end_early() -> None:
    plans = [estimate(replace(JOB, reached=n), HERE, 100 * 2**30) for n in (None, 30, 15, 0)]
    assert plans[0].seconds == plans[1].seconds > plans[2].seconds > plans[3].seconds
    assert plans[3].flops > 0.4 * plans[0].flops


def test_the_command_says_what_to_set_and_that_can_be_set(
    tunesmith: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.models import plan

    recipe["train"]["pack_tokens"] = 4096
    path = write_recipe(tmp_path, recipe)
    found = tunesmith("plan", path, "--json").json
    assert found["fits"] and found["changes"] == []
    monkeypatch.setattr(plan, "free_memory", lambda: found["peak_bytes"] - 1)
    said = tunesmith("plan", path)
    assert said.code == 0 and "It does not fit. Cheapest change first: --set train.pack_tokens=" in said.out
    change = tunesmith("plan", path, "--json").json["changes"][0]
    sets = [f"--set={key}={value}" for key, value in change["settings"].items()]
    assert tunesmith("plan", path, *sets, "--json").json["peak_bytes"] == change["peak_bytes"]


def test_memory_that_runs_out_does_so_before_the_first_step_and_says_what_to_set(
    tunesmith: Any, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real failed allocation, in the longest batch."""
    from tunesmith.models.packed import PackedForward

    recipe["train"] |= {"pack_tokens": 4096, "precision": "float32"}
    real = PackedForward.nll

    def greedy(self: PackedForward, *given: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            torch.empty(2**46)
        return real(self, *given)

    monkeypatch.setattr(PackedForward, "nll", greedy)
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 2 and "memory ran out in the longest step, tried before the first" in said.err
    assert "train.pack_tokens=" in said.err and "Traceback" not in said.err
    assert not (tmp_path / "runs/tiny/metrics.jsonl").read_text()
