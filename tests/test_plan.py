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

LINEAR = {f"layer.{i}": (576, 1536) for i in range(210)}
SHAPE = Shape(135_000_000, 28_000_000, 576, 3 * 1536, 30, 49_152, LINEAR, 210 * 576 * 1536)
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
    full = replace(JOB, trained=135_000_000, added=0, eight_bit=True, format="nf4")
    changes = advise(full, round(0.5 * sum(peak_memory(full).values())))
    settings = [change.settings for change in changes]
    assert {"train.adapter": "lora"} in settings and {"train.optimizer": "adamw_8bit"} in settings
    assert {"train.adapter": "lora", "train.quantise": "nf4"} in settings
    assert not any("train.adapter" in change.settings for change in advise(JOB, 2**20))


def test_a_base_in_few_bits_is_advised_where_it_could_be(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """As the installed libraries and the adapter allow; and the peak is what the plan then says."""
    pytest.importorskip("bitsandbytes")
    from tunesmith.models import plan

    recipe["model"] = str(make_model(tmp_path / "wide", hidden_size=512, intermediate_size=2048))
    path = write_recipe(tmp_path, recipe)

    def advised(**settings: Any) -> list[dict[str, Any]]:
        sets = [f"--set=train.{key}={value}" for key, value in settings.items()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "free_memory", lambda device: 2**20)
            found: list[dict[str, Any]] = tunesmith("plan", path, "--json", *sets).json["changes"]
            return found

    (change,) = (c for c in advised() if c["settings"] == {"train.quantise": "nf4"})
    assert change["peak_bytes"] == tunesmith("plan", path, "--set=train.quantise=nf4", "--json").json["peak_bytes"]
    assert any(c["settings"] == {"train.quantise": "int8"} for c in advised(adapter="loha"))
    for others in ({"adapter": "boft"}, {"quantise": "int8"}):
        assert not any("train.quantise" in c["settings"] for c in advised(**others))
    recipe["model"] = str(make_model(tmp_path / "mixture", architecture="mixtral", num_local_experts=4))
    write_recipe(tmp_path, recipe)
    assert not any("train.quantise" in c["settings"] for c in advised())


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
    monkeypatch.setattr(plan, "free_memory", lambda device: found["peak_bytes"] - 1)
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


MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "gpt_neox": {},
    "phi": {},
    "phi3": {"pad_token_id": 0},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 8},
}


@pytest.mark.parametrize("architecture", MODELS)
def test_parameters_and_products_are_those_that_torch_counts(
    tunesmith: Any, recipe: Any, tmp_path: Path, architecture: str
) -> None:
    """A forward's products by torch's own counter; attention's (of tokens with tokens) are batched, and apart."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    from tests.test_quantise import resolved
    from tunesmith.models.plan import empty_model, shape_of

    folder = make_model(tmp_path / architecture, architecture=architecture, **MODELS[architecture])
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    shape, ids = shape_of(empty_model(resolved(folder))), torch.arange(40)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    assert 2 * 40 * (shape.products + shape.head) == counted
    recipe |= {"model": str(folder)}
    recipe["train"]["adapter"] = {"kind": "full"}
    planned = tunesmith("plan", write_recipe(tmp_path, recipe), "--json").json
    assert planned["parameters"] == planned["trained_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", MODELS)
def test_what_layers_keep_is_what_autograd_keeps(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    from tests.test_quantise import resolved
    from tunesmith.conversation.render import Rendered
    from tunesmith.models.packed import PackedForward
    from tunesmith.models.plan import KEPT_HIDDEN, empty_model, shape_of
    from tunesmith.train.adapters.lora import Lora

    sizes = {"hidden_size": 64, "intermediate_size": 256} | MODELS[architecture]
    rows = [Rendered(list(range(5, 105)), [0.0] * 60 + [1.0] * 40)] * 2
    kept = []
    for layers in (2, 4):
        folder = make_model(tmp_path / str(layers), architecture=architecture, num_hidden_layers=layers, **sizes)
        model = Lora(rank=1).attach(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        forward, found = PackedForward(model, rows), {}

        def count(t: torch.Tensor, found: dict[int, int] = found) -> torch.Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        pack = forward.pack(rows)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            forward.nll(pack)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(size for at, size in found.items() if at not in own))
    shape = shape_of(empty_model(resolved(folder)))
    a_token = (kept[1] - kept[0]) / 2 / 4 / len(pack.ids_T)
    # The same share of it for every family: BY_KEPT is measured over that.
    assert 0.75 < (KEPT_HIDDEN * shape.hidden + shape.inner) / a_token < 0.95


@pytest.mark.parametrize(
    ("method", "ratio"),
    [("cpo", 2), ("dpo", (2 * 4 + 2) / (4 + 2)), ("kto", (2 * (4 + 2) + 2) / (4 + 2 + 2)), ("distill", 2)],
)
def test_what_is_only_read_is_counted(tunesmith: Any, recipe: Any, tmp_path: Path, method: str, ratio: float) -> None:
    """In a frozen base's passes: four a trained token, two a read one. A reference is read once (there a strange answer
    shares the row's own prompt), strange answers in each epoch, by a teacher every row."""
    from tests.test_method_runs import to_train

    to_train(
        recipe, method, tmp_path, Path(recipe["model"]), adapter={"kind": "lora", "rank": 1, "targets": ["k_proj"]}
    )
    recipe["train"]["max_steps"] = None
    path = write_recipe(tmp_path, recipe)
    once, twice = (tunesmith("plan", path, f"--set=train.epochs={n}", "--json").json for n in (1, 2))
    assert twice["flops"] / once["flops"] == pytest.approx(ratio, rel=0.04)
    if method == "distill":
        alone = tunesmith("plan", path, "--set=train.method=sft", "--set=train.epochs=1", "--json").json
        assert once["flops"] / alone["flops"] == pytest.approx(6 / 4, rel=0.03)
        assert once["memory"]["teacher"] == 4 * (alone["parameters"] - alone["trained_parameters"])


def test_replay_rows_take_time(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    plain = tunesmith("plan", path, "--json").json
    keep = f"[{{kind: kl, rows: {tmp_path}/rows.jsonl, batch_size: 4}}]"
    held = tunesmith("plan", path, f"--set=train.keep={keep}", "--json").json
    assert held["flops"] == pytest.approx(2 * plain["flops"], rel=0.05)  # four rows beside the four of each step


def test_on_cuda_its_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2**30)
    there = estimate(replace(JOB, device="cuda"), HERE)
    assert there.available_bytes == 4 * 2**30 and "process" not in there.memory
    assert estimate(JOB, HERE).memory["process"] > 0


@pytest.mark.parametrize("total", [6, 7])
def test_what_is_measured_counts_the_loop_s_validations_and_checkpoints(
    monkeypatch: pytest.MonkeyPatch, total: int
) -> None:
    from tunesmith.train import calibrate
    from tunesmith.train.batching import Schedule

    monkeypatch.setattr(calibrate, "_timed", lambda act: 1.0)
    section = TrainSection(batch_size=4, validate_every=3, checkpoint_every=2)
    measured = calibrate.calibrate(
        section, Schedule(40, 4, total, 0), [10] * 40, HERE, lambda rows: 0, [10] * 4, lambda rows: 0, lambda: 0
    )
    validations, checkpoints = (
        sum(step % every == 0 or step == total for step in range(1, total + 1)) for every in (3, 2)
    )
    assert measured.seconds == total + validations + checkpoints
