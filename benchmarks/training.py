"""Training speed and memory, ours beside other tools', on the same rows, model and machine.

    python benchmarks/training.py [--what lora full dpo] [--peers trl trl-best llamafactory litgpt] [--rows FILE]
                                  [--pairs 5] [--steps 6]

Each peer is installed into an environment of its own (benchmarks/.peers/NAME) at first use, and does what of the three
it can (PEERS). A round is ours and then each peer, so that a machine's good and bad minutes fall on all; the figure is
the median over the rounds of ours by theirs, and our share of what matrix products alone would allow (their rate is
taken in the same process, before and after). Rates are real tokens (no padding; both endings of a pair whole) a second
of wall time from the end of the first step to the end of the last, a step being 8 rows; for pairs, what the reference
took for these rows is added to ours, which looks at all rows before the first step (TRL does in each). Everyone gets
the same guard against instructions that a machine only claims to have, and the same settings of the memory allocator.

`trl` is TRL as it comes; the others have their best settings for this machine: weights in its faster precision, one
row at a time (`trl-grouped`: eight of like length), no gradient checkpointing. Where a machine hides its AMX tiles
(tunesmith/models/tiles.py), peers are told them as we are: without that they would end, or have to do without. With
--untold they do without, as for a user who has found the setting that lets them run at all.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from environments import HERE, own_environment, peers_environment, python_of, run


class Peer(NamedTuple):
    """An environment, what to install there, the script that runs in it, its mode, and what it can train."""

    environment: str
    pins: tuple[str, ...]
    script: str
    mode: str
    trains: tuple[str, ...]


TRL = ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.0", "accelerate==1.15.0", "datasets==5.2.0")
PEERS = {
    "trl": Peer("trl", TRL, "trl_train.py", "default", ("lora", "full", "dpo")),
    "trl-best": Peer("trl", TRL, "trl_train.py", "best", ("lora", "full", "dpo")),
    "trl-grouped": Peer("trl", TRL, "trl_train.py", "grouped", ("lora", "full", "dpo")),
    "llamafactory": Peer("llamafactory", ("llamafactory==0.9.5",), "llamafactory_train.py", "best", ("lora", "full")),
    "litgpt": Peer(
        "litgpt", ("litgpt==0.5.13", "safetensors", "requests"), "litgpt_train.py", "best", ("lora", "full")
    ),
}
OURS = """
import json, resource, sys, time
import tunesmith
from tunesmith.models.machine import machine
machine()  # sets what must be set before torch is there
from tunesmith.runs import read_jsonl
from tunesmith.train import follow, reference
ends, write, looked, look = [], follow.append_jsonl, [], reference._computed
def noted(path, line):
    if path.name == "metrics.jsonl":
        ends.append(time.perf_counter())
    write(path, line)
follow.append_jsonl = noted
def timed(sequences, *rest):
    start = time.perf_counter()
    found = look(sequences, *rest)
    looked.append((time.perf_counter() - start) / len(sequences))
    return found
reference._computed, reference._read = timed, lambda *given: None
import torch
from limit import product_rate
from tunesmith.models.plan import empty_model, shape_of
from tunesmith.models.resolve import resolve
from tunesmith.models.section import ModelSection
recipe = json.loads(sys.argv[1])
plan = tunesmith.plan(recipe)
shapes = list(shape_of(empty_model(resolve(ModelSection(name=recipe["model"])))).linear.values())
rate = lambda: product_rate(shapes, getattr(torch, plan.precision), 1024)
rates = [rate()]
run = tunesmith.run(recipe, runs_folder=sys.argv[2], stages=("data", "train"))
tokens = sum(l["tokens"] for l in read_jsonl(run.run.metrics)[1:])
seconds = ends[-1] - ends[0] + sum(looked) * recipe["train"]["batch_size"] * (len(ends) - 1)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
rates.append(rate())
limit = sum(rates) / 2 * plan.tokens / plan.flops
print(json.dumps({"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": peak,
    "share_of_limit": tokens / seconds / limit}))
"""
TRAIN: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"kind": "lora", "rank": 16, "alpha": 32}},
    "full": {"adapter": "full", "learning_rate": 1e-5},
    "dpo": {"method": "dpo", "adapter": {"kind": "lora", "rank": 16, "alpha": 32}},
}


def told(figures: dict[str, Any]) -> str:
    return f"{figures['tokens_per_second']:.0f} tokens/s, {figures['peak_bytes'] / 2**30:.2f} GiB"


def lines_of(path: Path, count: int) -> list[str]:
    """The first rows of a file as JSON; of a table, the first column asks and the second answers."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".csv":
        lines = [json.dumps({"prompt": row[0], "completion": row[1]}) for row in [*csv.reader(lines)][1 : count + 1]]
    return lines[:count]


def rows_for(what: str, lines: list[str], folder: Path) -> Path:
    """The rows as they are; for pairs, each row's answer against the next row's."""
    head = folder / f"{what}.jsonl"
    if what == "dpo" and "rejected" not in json.loads(lines[0]):
        from tunesmith.data.reading import detect, read_rows
        from tunesmith.data.section import SourceSection

        plain = rows_for("plain", lines, folder)
        source = SourceSection(path=str(plain))
        layout = detect(source, plain)
        rows = [layout.read(row, source, "") for _, row in read_rows(source, plain)]  # type: ignore[arg-type]
        lines = [
            json.dumps(
                {
                    "prompt": [m.for_template() for m in row.prompt],
                    "chosen": [{"role": "assistant", "content": row.answer}],
                    "rejected": [{"role": "assistant", "content": other.answer}],
                }
            )
            for row, other in zip(rows, rows[1:] + rows[:1], strict=True)
            if row.answer != other.answer
        ]
    head.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return head


def summary(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both sides, and the median of the pairs' ratios with its least and greatest."""

    def middle(side: int, key: str) -> float:
        return statistics.median(pair[side][key] for pair in pairs)

    ratios = sorted(ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs)
    return {
        "median_ratio": round(statistics.median(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "ours_tokens_per_second": round(middle(0, "tokens_per_second")),
        "their_tokens_per_second": round(middle(1, "tokens_per_second")),
        "ours_peak_gib": round(middle(0, "peak_bytes") / 2**30, 2),
        "ours_share_of_product_limit": round(middle(0, "share_of_limit"), 2),
        "their_peak_gib": round(middle(1, "peak_bytes") / 2**30, 2),
        "versions": pairs[0][1]["versions"],
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--what", nargs="+", default=["lora"], choices=list(TRAIN))
    options.add_argument("--peers", nargs="+", default=["trl"], choices=list(PEERS))
    options.add_argument("--rows", default="tunesmith/recipes/quickstart/train.jsonl")
    options.add_argument("--count", type=int, default=512, help="how many rows of the file")
    options.add_argument("--pairs", type=int, default=5)
    options.add_argument("--steps", type=int, default=6, help="optimizer steps of 8 rows, TRL's default batch")
    options.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"], help="of weights")
    options.add_argument("--untold", action="store_true", help="peers do without tiles that the machine hides")
    given = options.parse_args()

    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    here = machine()
    precision = here.precision if given.precision == "auto" else given.precision
    environment, for_peers = own_environment(), peers_environment(given.untold)
    model = resolve(ModelSection(name="smollm2-135m-instruct")).path
    print(json.dumps({"machine": here.as_dict(), "rows": given.rows, "steps": given.steps}))
    lines = lines_of(Path(given.rows), given.count)

    with tempfile.TemporaryDirectory() as folder:
        for what in given.what:
            head = rows_for(what, lines, Path(folder))
            train = {"batch_size": 8, "max_steps": given.steps, "epochs": 100, "precision": given.precision}
            recipe: dict[str, Any] = {
                "model": "smollm2-135m-instruct",
                "data": {"sources": [str(head)], "split": {"validation": 0, "test": 0}, "over_length": "drop"},
                "train": train | TRAIN[what],
            }
            names = [name for name in given.peers if what in PEERS[name].trains]
            pythons = {name: python_of(PEERS[name].environment, PEERS[name].pins) for name in names}
            rounds: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {name: [] for name in names}
            for number in range(given.pairs):
                recipe["name"] = f"{what}-{number}"
                ours = run([sys.executable, "-c", OURS, json.dumps(recipe), folder], environment)
                rows = Path(folder) / recipe["name"] / "data" / "train.jsonl"
                for name in names:
                    peer = PEERS[name]
                    script = [str(pythons[name]), str(HERE / "peers" / peer.script), str(model), str(rows)]
                    theirs = run([*script, what, peer.mode, str(given.steps), precision], for_peers)
                    rounds[name].append((ours, theirs))
                    print(f"{what}, {name} {number}: ours {told(ours)}; theirs {told(theirs)}", flush=True)
            for name in names:
                print(json.dumps({"what": what, "peer": name} | summary(rounds[name])), flush=True)


if __name__ == "__main__":
    main()
