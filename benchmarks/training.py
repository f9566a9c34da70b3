"""LoRA fine-tuning speed and memory, ours beside TRL's, on the same rows, model and machine.

    python benchmarks/training.py [--rows FILE] [--pairs 5] [--modes default best] [--steps 6]

TRL is installed into an environment of its own (benchmarks/.peers/trl). Runs alternate, ours first, so that
a machine's good and bad minutes fall on both; the figure is the median of the pairs' ratios. Rates are real
tokens (no padding) a second of wall time from the end of the first step to the end of the last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PINS = ("torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "peft==0.21.0", "accelerate==1.15.0", "datasets==5.2.0")
OURS = """
import json, resource, sys, time
import tunesmith
from tunesmith.models.machine import machine
machine()  # sets what must be set before torch is there
from tunesmith.runs import read_jsonl
from tunesmith.train import train
ends, write = [], train.append_jsonl
train.append_jsonl = lambda *a: (ends.append(time.perf_counter()), write(*a))
run = tunesmith.run(json.loads(sys.argv[1]), runs_folder=sys.argv[2], stages=("data", "train"))
tokens = sum(l["tokens"] for l in read_jsonl(run.run.metrics)[1:])
seconds = ends[-1] - ends[0]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": peak}))
"""


def peer_python() -> Path:
    """The Python of TRL's own environment, made at first use."""
    folder = HERE / ".peers" / "trl"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print("Installing TRL into", folder, file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS], check=True)
        (folder / "ready").touch()
    return python


def run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[:2]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def told(figures: dict[str, Any]) -> str:
    return f"{figures['tokens_per_second']:.0f} tokens/s, {figures['peak_bytes'] / 2**30:.2f} GiB"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", default="tunesmith/recipes/quickstart/train.jsonl")
    options.add_argument("--count", type=int, default=512, help="how many rows of the file")
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--steps", type=int, default=6, help="optimizer steps of 8 rows, TRL's default batch")
    options.add_argument("--modes", nargs="+", default=["default"], choices=["default", "best"])
    options.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="ours")
    given = options.parse_args()

    from tunesmith.models.machine import ISA, machine
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection
    from tunesmith.runs import read_jsonl

    here = machine()
    # TRL gets the same guard against instructions that this machine only claims to have.
    environment = dict(os.environ) | ({ISA: here.isa} if here.isa else {})
    model = resolve(ModelSection(name="smollm2-135m-instruct")).path
    python = peer_python()
    print(json.dumps({"machine": here.as_dict(), "rows": given.rows, "steps": given.steps}))

    with tempfile.TemporaryDirectory() as folder:
        head = Path(folder) / "head.jsonl"
        lines = Path(given.rows).read_text(encoding="utf-8").splitlines()[: given.count]
        head.write_text("\n".join(lines) + "\n", encoding="utf-8")
        recipe = {
            "name": "ours",
            "model": "smollm2-135m-instruct",
            "data": {"sources": [str(head)], "split": {"validation": 0, "test": 0}},
            "train": {"batch_size": 8, "max_steps": given.steps, "epochs": 100, "precision": given.precision},
        }
        for mode in given.modes:
            pairs = []
            for number in range(given.pairs):
                recipe["name"] = f"{mode}-{number}"
                ours = run([sys.executable, "-c", OURS, json.dumps(recipe), folder], environment)
                rows = Path(folder) / recipe["name"] / "data" / "train.jsonl"
                assert read_jsonl(rows)
                script = str(HERE / "peers" / "trl_sft.py")
                theirs = run(
                    [str(python), script, str(model), str(rows), mode, str(given.steps), here.precision], environment
                )
                ratio = ours["tokens_per_second"] / theirs["tokens_per_second"]
                pairs.append((ratio, ours, theirs))
                print(f"{mode} {number}: ours {told(ours)}; TRL {told(theirs)}; ratio {ratio:.2f}", flush=True)
            ratios = sorted(p[0] for p in pairs)
            print(
                json.dumps(
                    {
                        "mode": mode,
                        "median_ratio": round(statistics.median(ratios), 2),
                        "spread": [round(ratios[0], 2), round(ratios[-1], 2)],
                        "ours_tokens_per_second": round(statistics.median(p[1]["tokens_per_second"] for p in pairs)),
                        "trl_tokens_per_second": round(statistics.median(p[2]["tokens_per_second"] for p in pairs)),
                        "ours_peak_gib": round(statistics.median(p[1]["peak_bytes"] for p in pairs) / 2**30, 2),
                        "trl_peak_gib": round(statistics.median(p[2]["peak_bytes"] for p in pairs) / 2**30, 2),
                        "versions": pairs[0][2]["versions"],
                    }
                )
            )


if __name__ == "__main__":
    main()
