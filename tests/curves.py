"""Short trainings whose loss and gradient norm at each step are kept in tests/golden, to be held against.

`tests/test_golden.py` compares; `tools/golden.py` writes them anew.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.conftest import COLOURS, make_model, write_jsonl, write_recipe

GOLDEN = Path(__file__).parent / "golden"
# Relative. Processors with other instructions (tried: plain, AVX2, AVX-512) part by less than a tenth of it.
TOLERANCE = {"loss": 1e-4, "grad_norm": 1e-3}
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy")
LORA = {"kind": "lora", "rank": 4, "alpha": 8}
CASES: dict[str, dict[str, Any]] = {
    "sft-lora": {},
    "sft-dora-rslora": {"adapter": LORA | {"dora": True, "rslora": True}},
    "sft-adalora": {"adapter": {"kind": "adalora", "rank": 2, "warm": 0, "settled": 0.2}},
    "sft-ia3-sgd": {"adapter": "ia3", "optimizer": "sgd", "learning_rate": 0.05},
    "sft-prefix": {"adapter": {"kind": "prefix", "tokens": 4}},
    "sft-bottleneck-lion": {"adapter": {"kind": "bottleneck", "size": 8}, "optimizer": "lion", "learning_rate": 3e-4},
    "sft-lora-nf4": {"quantise": "nf4"},
    "sft-lora-two-ranks": {"ranks": 2, "parallel": "ddp"},
    "sft-full": {"adapter": "full", "weight_decay": 0.1, "layer_decay": 0.8},
    "sft-full-muon-gpt2": {"adapter": "full", "optimizer": "muon", "model": "gpt2"},
    "sft-lora-smoothed-qwen3": {"method": {"kind": "sft", "label_smoothing": 0.1}, "model": "qwen3"},
    "text-partial-adafactor": {
        "method": "text",
        "adapter": {"kind": "partial", "last_layers": 1},
        "optimizer": "adafactor",
    },
    "dpo-lora": {"method": {"kind": "dpo", "sft_weight": 0.2}},
    "ipo-full": {"method": {"kind": "dpo", "form": "ipo", "length_normalised": True}, "adapter": "full"},
    "cpo-lora": {"method": {"kind": "cpo", "label_smoothing": 0.1}},
    "simpo-lora": {"method": "simpo"},
    "orpo-lora": {"method": "orpo"},
    "kto-lora": {"method": "kto"},
    "reward-lora": {"method": "reward"},
    "classify-lora": {"method": {"kind": "classify", "weights": "balanced"}},
    "distill-lora": {"method": {"kind": "distill", "beta": 0.5, "teacher": "gpt2", "precision": "float32"}},
}
FAMILIES: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"head_dim": 8}, "gpt2": {}}


def trained(name: str, folder: Path) -> list[dict[str, float]]:
    """Train a case in `folder`, on one thread a rank: loss and gradient norm of each step."""
    import torch

    from tests.ranked import shared, walk
    from tunesmith.runs import read_jsonl

    case = dict(CASES[name])
    ranks = case.pop("ranks", 1)
    model = _model(case.pop("model", "llama"), folder)
    method = case.get("method", "sft")
    if isinstance(method, dict) and "teacher" in method:
        case["method"] = method | {"teacher": str(_model(method["teacher"], folder))}
    train = {
        "max_steps": 6,
        "batch_size": 5,
        "pack_tokens": 96,
        "max_length": 128,
        "learning_rate": 0.002,
        "precision": "float32",
        "checkpoint_every": 99,
        "samples": 0,
        "adapter": LORA,
    }
    keys = {
        "name": name,
        "model": str(model),
        "data": {"sources": [{"path": str(_rows(method, folder))}], "split": {"validation": 4, "test": 4}},
        "train": train | case,
    }
    path = write_recipe(folder, keys, f"{name}.yaml")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if ranks > 1:
            shared(path, [(".", (), "")])
        else:
            walk(path, folder / "runs", [(".", (), "")])
    finally:
        torch.set_num_threads(threads)
    lines = read_jsonl(folder / "runs" / name / "metrics.jsonl")
    return [{what: line[what] for what in TOLERANCE} for line in lines]


def kept(name: str) -> dict[str, Any]:
    """What is kept of a case: its steps, and the environment in which they were taken."""
    found: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return found


def keep(name: str, steps: list[dict[str, float]]) -> None:
    """Write a case's steps."""
    told = {"case": CASES[name], "environment": environment(), "steps": steps}
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def moved(before: list[dict[str, float]], now: list[dict[str, float]]) -> str:
    """Where two curves first differ by more than the tolerance; empty where they do not."""
    if len(before) != len(now):
        return f"{len(now)} steps, not {len(before)}"
    for step, (old, new) in enumerate(zip(before, now, strict=True), 1):
        for what, tolerance in TOLERANCE.items():
            if not abs(new[what] - old[what]) <= tolerance * abs(old[what]):
                return f"{what} of step {step} is {new[what]:.7g}, not {old[what]:.7g}"
    return ""


def environment() -> dict[str, str]:
    """What could move a curve besides this code."""
    import torch

    return {name: version(name) for name in PACKAGES} | {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": "1",
    }


def _model(family: str, folder: Path) -> Path:
    there = folder / family
    return there if there.is_dir() else make_model(there, architecture=family, **FAMILIES[family])


def _rows(method: Any, folder: Path) -> Path:
    """Rows of uneven length of the kind that a method takes."""
    kind = method["kind"] if isinstance(method, dict) else method
    rows: list[dict[str, Any]] = []
    for i in range(40):
        prompt = f"Item {i} is {COLOURS[i % 4]}. {'So it is. ' * (i * 7 % 5)}What colour is it?"
        right, wrong = COLOURS[i % 4], COLOURS[(i + 1) % 4] + " it may be" * (i % 2)
        if kind in ("dpo", "cpo", "simpo", "orpo", "reward"):
            rows.append({"prompt": prompt, "chosen": right + " indeed" * (i % 3), "rejected": wrong})
        elif kind == "kto":
            rows.append({"prompt": prompt, "completion": right if i % 3 else wrong, "label": i % 3 > 0})
        elif kind == "text":
            rows.append({"text": f"{prompt} {right}. " * (1 + i % 2)})
        else:
            rows.append({"prompt": prompt, "completion": right + " indeed" * (i % 3 if kind != "classify" else 0)})
    return write_jsonl(folder / f"{kind}.jsonl", rows)
