"""Two ranks on this machine (gloo) against one process: the same weights, and one reason when one dies."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import COLOURS, make_model, write_jsonl, write_recipe
from tests.ranked import in_pair, shared, walk
from tunesmith.conversation.message import Conversation, Message
from tunesmith.errors import MachineError, RankLost, RecipeError
from tunesmith.inference.transformers_engine import TransformersEngine
from tunesmith.models.machine import machine
from tunesmith.runs import read_jsonl
from tunesmith.train.batching import Schedule
from tunesmith.train.ranks import Ranks
from tunesmith.train.ready import _examples
from tunesmith.train.section import TrainSection

ROOT = Path(__file__).parents[1]
STEPS = 8
ZERO = importlib.util.find_spec("deepspeed") is not None
FULL = ("train.adapter=full", "train.learning_rate=0.001")
KEEP = ("train.keep=[l2, {kind: ewc, rows: general.jsonl}, {kind: kl, rows: general.jsonl, batch_size: 3}]",)
DROPOUT = ("train.adapter.dropout=0.3",)
ROUNDED = ("train.precision=bfloat16",)


def of(kind: str) -> tuple[str, ...]:
    name, _, stage = kind.partition("-")
    return (f"train.parallel.kind={name}", *([f"train.parallel.stage={stage}"] if stage else []))


# A run: its name, what is set, and the run that it goes on from after step 4.
METHODS = {
    "dpo": ("train.method=dpo", "data.sources=[{path: pairs.jsonl}]", "train.pack_tokens=160"),
    "kto": ("train.method=kto", "data.sources=[{path: rated.jsonl}]"),
}
# Those with a head or with another model beside.
MORE_METHODS = {
    "reward": ("train.method=reward", "data.sources=[{path: pairs.jsonl}]", "train.pack_tokens=160"),
    "classify": ("train.method={kind: classify, weights: balanced}", "data.sources=[{path: named.jsonl}]"),
    "distill": ("train.method={kind: distill, teacher: teacher, beta: 0.5, precision: float32}",),
}
KINDS = ["ddp", "fsdp", *(["zero-2", "zero-3"] if ZERO else [])]
ALONE = [("one", (), ""), ("one-full", FULL, ""), ("one-keep", KEEP, "")]
ALONE += [(f"one-{name}", sets, "") for name, sets in METHODS.items()]
SHARED = [(kind, of(kind), "") for kind in KINDS]
SHARED += [(f"{kind}-again", of(kind), kind) for kind in KINDS if kind != "ddp"]
SHARED += [("ddp-dropout", (*of("ddp"), *DROPOUT), ""), ("ddp-dropout-again", (*of("ddp"), *DROPOUT), "ddp-dropout")]
SHARED += [("ddp-keep", (*of("ddp"), *KEEP), ""), ("ddp-keep-again", (*of("ddp"), *KEEP), "ddp-keep")]
SHARED += [("fsdp-full", (*of("fsdp"), *FULL), ""), ("fsdp-from-one", of("fsdp"), "one")]
SHARED += [(f"fsdp-{name}", (*of("fsdp"), *sets), "") for name, sets in METHODS.items()]
BACK = [("one-from-fsdp", (), "fsdp")]
# What takes minutes, for `make test-all`.
LONG_ALONE = [("one-rounded", ROUNDED, ""), *((f"one-{name}", sets, "") for name, sets in MORE_METHODS.items())]
LONG_SHARED = [
    ("ddp-full", (*of("ddp"), *FULL), ""),
    *((f"{kind}-rounded", (*of(kind), *ROUNDED), "") for kind in KINDS),
    *((f"ddp-{n}", (*of("ddp"), *sets), "") for n, sets in MORE_METHODS.items()),
    *((f"ddp-{n}", (*of("ddp"), *sets), "") for n, sets in METHODS.items()),
]
if ZERO:
    LONG_SHARED += [("zero-1", of("zero-1"), ""), ("zero-1-again", of("zero-1"), "zero-1")]
    LONG_SHARED += [(f"{kind}-full", (*of(kind), *FULL), "") for kind in ("zero-1", "zero-2", "zero-3")]
    LONG_SHARED += [(f"{kind}-from-one", of(kind), "one") for kind in ("zero-1", "zero-2", "zero-3")]
    LONG_SHARED += [(f"zero-3-{name}", (*of("zero-3"), *sets), "") for name, sets in METHODS.items()]
long = pytest.mark.long


def uneven_rows(n: int = 45) -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Item {i} is {COLOURS[i % 4]}. {'So it is. ' * (i * 7 % 5)}What colour is it?",
            "completion": COLOURS[i % 4] + " indeed" * (i % 3),
        }
        for i in range(n)
    ]


def keys(folder: Path, model: Path) -> dict[str, Any]:
    """Steps of five rows and a last one of a single row, in packs of about two rows."""
    rows = uneven_rows()
    sources = [{"path": str(write_jsonl(folder / f"{i}.jsonl", rows[i::2])), "tag": str(i)} for i in range(2)]
    others = [row["completion"] for row in rows[1:] + rows[:1]]
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "rejected": o} for r, o in zip(rows, others, strict=True)
    ]
    write_jsonl(folder / "pairs.jsonl", pairs)
    write_jsonl(folder / "general.jsonl", rows[:7])
    write_jsonl(folder / "rated.jsonl", [row | {"label": i % 3 > 0} for i, row in enumerate(rows)])
    write_jsonl(folder / "named.jsonl", [row | {"completion": COLOURS[i % 4]} for i, row in enumerate(rows)])
    return {
        "name": "tiny",
        "model": str(model),
        "data": {"sources": sources, "split": {"validation": 4, "test": 5, "stratify": "tag"}},
        "train": {
            "epochs": 1,
            "batch_size": 5,
            "pack_tokens": 64,
            "learning_rate": 0.01,
            "max_length": 128,
            "checkpoint_every": 2,
            "keep_checkpoints": 9,
            "validate_every": 3,
            "precision": "float32",
            "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        },
    }


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs by one process and by two, on the same recipe: runs/NAME/tiny."""
    folder = tmp_path_factory.mktemp("ranks")
    assert Schedule.of(36, 5, 1, None, 7).total == STEPS  # 45 rows, less those held out: the last step has one row
    path = write_recipe(folder, keys(folder, tiny_model))
    walk(path, folder / "runs", ALONE)
    shared(path, SHARED)
    walk(path, folder / "runs", BACK)
    return folder / "runs"


@pytest.fixture(scope="module")
def trained_long(trained: Path) -> Path:
    recipe = trained.parent / "tiny.yaml"
    make_model(trained.parent / "teacher", num_hidden_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained.parent)  # what a teacher's name is relative to
        walk(recipe, trained, LONG_ALONE)
        shared(recipe, LONG_SHARED)
    return trained


def weights(runs: Path, name: str) -> dict[str, Any]:
    train = runs / name / "tiny/train"
    whole = train / "model/model.safetensors"
    return load_file(whole if whole.is_file() else train / "adapter/adapter_model.safetensors")


def went_on(runs: Path, name: str) -> None:
    """Only what the checkpoint after step 4 did not hold was trained."""
    started = [e["step"] for e in read_jsonl(runs / name / "tiny/events.jsonl") if e["event"] == "train_started"]
    assert started == [0, 4]


def assert_close(runs: Path, one: str, other: str) -> None:
    a, b = weights(runs, one), weights(runs, other)
    assert set(a) == set(b)
    for name, tensor in a.items():
        assert (tensor - b[name]).abs().max() < 2e-5 + 1e-4 * tensor.abs().max(), name


def needs_zero(name: str) -> None:
    if "zero" in name and not ZERO:
        pytest.skip("DeepSpeed is not installed (the extra 'zero')")


def assert_same_curve(runs: Path, one: str, other: str) -> None:
    """The same figures each step, and the same weights after the last."""
    assert_close(runs, one, other)
    alone, shared = (read_jsonl(runs / name / "tiny/metrics.jsonl") for name in (one, other))
    assert [line["step"] for line in shared] == list(range(1, STEPS + 1))
    for a, b in zip(alone, shared, strict=True):
        assert set(a) == set(b) and a["tokens"] == b["tokens"]
        for name in set(a) - {"tokens_per_second", "memory_bytes", "seconds", "use"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero-2", "zero-3"])
def test_two_ranks_train_what_one_trains(trained: Path, kind: str) -> None:
    needs_zero(kind)
    assert_same_curve(trained, "one", kind)
    summary = json.loads((trained / kind / "tiny/train/manifest.json").read_text())["summary"]
    assert summary["ranks"] == 2 and summary["parallel"] == kind.partition("-")[0]
    assert "fused" in summary["forward"]


@pytest.mark.parametrize("what", ["full", *METHODS])
def test_all_weights_and_other_methods_are_trained_alike_too(trained: Path, what: str) -> None:
    assert_same_curve(trained, f"one-{what}", f"fsdp-{what}")


def test_what_holds_a_model_near_its_start_does_so_on_two_ranks(trained: Path) -> None:
    assert_same_curve(trained, "one-keep", "ddp-keep")
    last = read_jsonl(trained / "ddp-keep/tiny/metrics.jsonl")[-1]
    assert all(last[f"keep_{kind}"] > 0 for kind in ("l2", "ewc", "kl"))


@pytest.mark.parametrize("kind", ["ddp-dropout", "ddp-keep", "fsdp", "zero-2", "zero-3"])
def test_a_run_of_two_ranks_goes_on_bit_for_bit(trained: Path, kind: str) -> None:
    needs_zero(kind)
    found = [trained / name / "tiny/train/adapter/adapter_model.safetensors" for name in (kind, f"{kind}-again")]
    assert found[0].read_bytes() == found[1].read_bytes()
    went_on(trained, f"{kind}-again")


@pytest.mark.parametrize("name", ["fsdp-from-one", "one-from-fsdp"])
def test_a_checkpoint_is_the_same_at_any_number_of_ranks(trained: Path, name: str) -> None:
    assert_close(trained, "one", name)
    went_on(trained, name)


def assert_alike(runs: Path, one: str, other: str) -> None:
    """The same curve and weights, as far as bfloat16's three digits go."""
    a, b = (read_jsonl(runs / name / "tiny/metrics.jsonl") for name in (one, other))
    assert [line["tokens"] for line in a] == [line["tokens"] for line in b] and len(b) == STEPS
    for what, off in (("loss", 0.02), ("grad_norm", 0.1)):
        assert [line[what] for line in b] == pytest.approx([line[what] for line in a], rel=off), (other, what)
    sides = [weights(runs, name) for name in (one, other)]
    assert set(sides[0]) == set(sides[1])
    flat = [torch.cat([side[name].float().flatten() for name in sorted(side) if "lora_B" in name]) for side in sides]
    assert torch.nn.functional.cosine_similarity(*flat, 0) > 0.98, other
    summary = json.loads((runs / other / "tiny/train/manifest.json").read_text())["summary"]
    assert summary["precision"] == "bfloat16" and "fused" in summary["forward"], other


@long
def test_several_ranks_say_that_a_whole_model_is_trained_in_float32(tiny_model: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, keys(tmp_path, tiny_model))
    sets = [word for setting in (*FULL, *ROUNDED, "train.max_steps=1") for word in ("--set", setting)]
    command = [sys.executable, "-m", "tunesmith", "train", str(path), "--nproc", "2", *sets]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = "precision float32 in place of bfloat16: several ranks train a whole model in float32"
    assert done.stderr.count(told) == 1
    summary = json.loads((tmp_path / "runs/tiny/train/manifest.json").read_text())["summary"]
    assert summary["precision"] == "float32" and summary["ranks"] == 2


@long
def test_every_way_trains_all_that_one_trains(trained_long: Path) -> None:
    for name, _, origin in LONG_SHARED:
        kind, _, what = name.rpartition("-")
        if what in ("full", *METHODS, *MORE_METHODS):
            assert_same_curve(trained_long, f"one-{what}", name)
        elif what == "rounded":
            assert_alike(trained_long, "one-rounded", name)
        elif what == "again":
            files = [trained_long / n / "tiny/train/adapter/adapter_model.safetensors" for n in (kind, name)]
            assert files[0].read_bytes() == files[1].read_bytes()
        else:
            assert_close(trained_long, origin or "one", name)
        if origin:
            went_on(trained_long, name)


def test_checkpoints_of_all_kinds_hold_the_same_tensors(trained: Path) -> None:
    one = load_file(trained / "one/tiny/train/checkpoints/step-000008/state.safetensors")
    for kind in KINDS:
        other = load_file(trained / kind / "tiny/train/checkpoints/step-000008/state.safetensors")
        assert set(other) == set(one) | {"random/torch/1"}, kind
        assert all(other[name].shape == tensor.shape for name, tensor in one.items())


def test_a_killed_rank_ends_all_with_its_name_and_a_stop_saves(tiny_model: Path, tmp_path: Path) -> None:
    """One run: its second rank is killed; it goes on, and is stopped by Ctrl-C."""
    recipe = keys(tmp_path, tiny_model)
    recipe["train"] |= {"epochs": 2000}
    command = [sys.executable, "-m", "tunesmith", "train", str(write_recipe(tmp_path, recipe)), "--nproc", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    metrics = tmp_path / "runs/tiny/metrics.jsonl"

    def start(until: int) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
        while process.poll() is None and (read_jsonl(metrics) or [{"step": 0}])[-1]["step"] < until:
            time.sleep(0.05)
        return process

    process = start(5)
    ranks = [child for child in psutil.Process(process.pid).children() if "tunesmith" in child.cmdline()]
    second = next(child for child in ranks if child.environ().get("RANK") == "1")
    assert len(ranks) == 2 and second.environ()["MALLOC_TOP_PAD_"] and second.environ()["OMP_NUM_THREADS"]
    second.kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == MachineError.exit_code
    assert said.count("Error") == 1 and "rank 1 of 2 ended with exit code -9 (SIGKILL)" in said, said
    assert "Traceback" not in said and "goes on from the last checkpoint" in said
    assert not psutil.wait_procs(ranks, 10)[1]

    process = start(read_jsonl(metrics)[-1]["step"] + 5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "Going on from step" in said and said.count("everything is saved") == 1 and "Traceback" not in said
    saved = sorted((tmp_path / "runs/tiny/train/checkpoints").glob("step-*"))
    lines = read_jsonl(metrics)
    assert int(saved[-1].name[-6:]) == lines[-1]["step"]
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["step"] + 1))


def test_a_teacher_answers_once_for_all_ranks(
    tiny_model: Path, renderer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path))
    method = {
        "kind": "distill",
        "teacher": str(tiny_model),
        "source": "text",
        "max_new_tokens": 4,
        "precision": "float32",
    }
    section = TrainSection.model_validate({"method": method})
    rows = [Conversation((Message("user", f"Item {i}?"), Message("assistant", "red")), f"r:{i}") for i in range(4)]
    asked: list[int] = []
    generate = TransformersEngine.generate

    def counted(engine: Any, prompts: Any, *more: Any) -> Any:
        asked.append(len(prompts))
        time.sleep(0.1)
        return generate(engine, prompts, *more)

    monkeypatch.setattr(TransformersEngine, "generate", counted)

    def examples(ranks: Ranks) -> Any:
        given = SimpleNamespace(
            training=rows[:3], validation=rows[3:], renderer=renderer, model=None, ranks=ranks, machine=machine()
        )
        return _examples(section, given)[2:]

    one, other = in_pair(examples)
    assert asked == [3, 1] and one == other and len(one[0]) == 3


def test_rows_are_shared_out_by_length_and_none_is_lost() -> None:
    lengths = [5, 90, 10, 10, 80, 7, 3]
    parts = Ranks(world=3).share(range(7), lengths.__getitem__)
    assert sorted(i for part in parts for i in part) == list(range(7))
    assert max(sum(lengths[i] for i in part) for part in parts) == 90
    assert Ranks(world=3).share([4], lengths.__getitem__) == [[4], [], []]
    assert Ranks().share([3, 1, 2], lengths.__getitem__) == [[3, 1, 2]]


def test_the_reason_is_the_rank_that_ended_first_and_not_its_echo() -> None:
    from tunesmith.train.launch import _why

    echo = RankLost("lost touch with another rank").as_dict()
    own = MachineError("memory ran out", where="train.pack_tokens", fix="Set it lower.").as_dict()
    assert "rank 1 of 2 ended with exit code -9" in str(_why({0: 2, 1: -9}, {0: echo}, 2))
    told = _why({0: 2, 1: 2}, {0: echo, 1: own}, 2)
    assert isinstance(told, MachineError) and told.what == "rank 1 of 2: memory ran out"
    assert _why({0: 2, 1: 2}, {0: own, 1: own}, 2).what == "memory ran out"
    assert "exit code 3" in str(_why({0: -15, 1: 3}, {}, 2))


@pytest.mark.parametrize(
    ("setting", "told"), [("train.parallel=dpp", "did you mean 'ddp'"), ("train.parallel.stage=4", "unknown key")]
)
def test_a_wrong_way_to_share_is_refused(tunesmith: Any, recipe: Any, tmp_path: Path, setting: str, told: str) -> None:
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--set", setting)
    assert said.code == 2 and told in said.err


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"parallel": "zero", "optimizer": "adafactor"}, "train.parallel"),
        ({"parallel": "fsdp", "optimizer": "muon"}, "train.parallel"),
        ({"parallel": "fsdp", "keep": ["l2"]}, "train.keep"),
        ({"parallel": "zero", "keep": ["l2"]}, "train.keep"),
        ({"adapter": {"kind": "full", "unfreeze_every": 2}}, "train.adapter"),
        ({"parallel": "fsdp", "adapter": "adalora"}, "train.parallel"),
        ({"parallel": "fsdp", "quantise": "nf4"}, "train.quantise"),
        ({"parallel": "fsdp", "best_by": "exact_match"}, "train.best_by"),
    ],
)
def test_what_only_one_process_does_is_refused(keys: dict[str, Any], where: str) -> None:
    from tunesmith.train.parallel.check import several

    several(TrainSection.model_validate({"parallel": "zero"}))
    several(TrainSection.model_validate({"parallel": "fsdp", "adapter": "full"}))
    several(TrainSection.model_validate({"keep": ["l2"]}))
    several(TrainSection.model_validate({"optimizer": "muon", "best_by": "exact_match"}))
    with pytest.raises(RecipeError) as refused:
        several(TrainSection.model_validate(keys))
    assert refused.value.where == where
