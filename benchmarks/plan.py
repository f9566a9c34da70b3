"""How far plans are off: what `tunesmith plan` foretells of a training beside what it then takes.

    python benchmarks/plan.py                    # twelve configurations: adapters, ranks, lengths, batches, sizes
    python benchmarks/plan.py --only 2 --steps 4 # the first two, quickly

Memory is the process's peak while training (the planned parts, the process itself included). Time is the training's,
validations and checkpoints included; it is compared both with the plan and with what was measured before the first
step. Configurations named `tiny` and `wide` are models of a few layers, built here; `small` is the embedded model. Each
runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TEXT = "the customer asks when a parcel that was sent on monday will be there and who pays for it"
WORDS = TEXT.split()
TINY = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
WIDE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8}
LORA, FULL = {"kind": "lora", "rank": 16}, {"kind": "full"}
# name: model (None: the embedded one), adapter, words in a row, rows in a step, tokens in a pack
CONFIGURATIONS: dict[str, tuple[dict[str, int] | None, dict[str, Any], int, int, int]] = {
    "tiny, lora": (TINY, LORA, 60, 8, 1024),
    "tiny, full": (TINY, FULL, 60, 8, 1024),
    "wide, lora": (WIDE, LORA, 60, 8, 1024),
    "wide, full": (WIDE, FULL, 60, 8, 1024),
    "wide, lora, long rows": (WIDE, LORA, 700, 4, 1024),
    "wide, lora, large packs": (WIDE, LORA, 200, 16, 4096),
    "small, lora": (None, LORA, 60, 8, 1024),
    "small, lora, rank 128": (None, {"kind": "lora", "rank": 128}, 60, 8, 1024),
    "small, lora, long rows": (None, LORA, 700, 4, 1024),
    "small, lora, large packs": (None, LORA, 200, 16, 2048),
    "small, ia3": (None, {"kind": "ia3"}, 60, 8, 1024),
    "small, last two layers": (None, {"kind": "partial", "last_layers": 2}, 60, 8, 1024),
}
TRAIN = """
import json, sys, time
import tunesmith
recipe, runs = json.loads(sys.argv[1]), sys.argv[2]
plan = tunesmith.plan(recipe).as_dict()
run = tunesmith.run(recipe, runs_folder=runs, stages=("data", "train"))
from tunesmith.runs import read_jsonl
lines = read_jsonl(run.run.metrics)
told = run.run.manifest("train")["summary"]
print(json.dumps({
    "planned_bytes": told["plan"]["peak_bytes"], "planned_seconds": told["plan"]["seconds"],
    "corrected_seconds": told["measured"]["seconds"],
    "bytes": max(line["memory_bytes"] for line in lines),
    "seconds": sum(sum(line["seconds"].values()) for line in lines),
    "parts": plan["memory"],
}))
"""


def make_model(folder: Path, sizes: dict[str, int]) -> Path:
    """A seeded Llama of these sizes, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded())
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        **sizes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def embedded() -> Path:
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    return resolve(ModelSection(name="smollm2-135m-instruct")).path


def rows(path: Path, words: int, count: int = 160) -> Path:
    """Seeded rows whose lengths lie around `words`."""
    import random

    draw = random.Random(7)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            size = max(8, round(words * draw.uniform(0.5, 1.3)))
            asked = " ".join(draw.choices(WORDS, k=size))
            file.write(json.dumps({"prompt": f"{number}: {asked}?", "completion": " ".join(draw.choices(WORDS, k=12))}))
            file.write("\n")
    return path


def off(found: float, foretold: float) -> float:
    return 100 * (foretold / found - 1)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", type=int, help="how many of the configurations")
    options.add_argument("--match", default="", help="only those whose name holds this")
    options.add_argument("--steps", type=int, default=20)
    given = options.parse_args()
    chosen = [name for name in CONFIGURATIONS if given.match in name][: given.only]
    memory, plain, corrected = [], [], []
    with tempfile.TemporaryDirectory() as place:
        for number, name in enumerate(chosen):
            sizes, adapter, words, batch, pack = CONFIGURATIONS[name]
            folder = Path(place) / str(number)
            folder.mkdir()
            model = str(make_model(folder / "model", sizes)) if sizes else "smollm2-135m-instruct"
            recipe = {
                "name": "measured",
                "model": model,
                "data": {"sources": [str(rows(folder / "rows.jsonl", words))], "split": {"validation": 16, "test": 0}},
                "train": {
                    "adapter": adapter,
                    "batch_size": batch,
                    "pack_tokens": pack,
                    "max_length": 2048,
                    "max_steps": given.steps,
                    "epochs": 100,
                    "learning_rate": 1e-4,
                    "samples": 0,
                },
            }
            command = [sys.executable, "-c", TRAIN, json.dumps(recipe), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
            found = json.loads(done.stdout.strip().splitlines()[-1])
            memory.append(off(found["bytes"], found["planned_bytes"]))
            plain.append(off(found["seconds"], found["planned_seconds"]))
            corrected.append(off(found["seconds"], found["corrected_seconds"]))
            print(
                f"{name}: memory {found['bytes'] / 2**20:,.0f} MiB, planned {memory[-1]:+.0f}%; "
                f"time {found['seconds']:.1f} s, planned {plain[-1]:+.0f}%, corrected {corrected[-1]:+.0f}%",
                flush=True,
            )
            print("   planned MiB:", {part: round(size / 2**20) for part, size in found["parts"].items()}, flush=True)
    told = {
        what: {
            "median_off_percent": round(statistics.median(map(abs, values)), 1),
            "worst": round(max(values, key=abs), 1),
        }
        for what, values in (("memory", memory), ("time as planned", plain), ("time as corrected", corrected))
    }
    print(json.dumps({"configurations": len(chosen), "steps": given.steps} | told))


if __name__ == "__main__":
    main()
