"""Answers a second on 500 test rows of BANKING77, and choices by likelihood, beside lm-evaluation-harness.

    BANKING77=.../banking77 python benchmarks/evaluation.py [--rows 500] [--choices 40] [--rounds 3] [--batch 8 32]

The harness is installed into an environment of its own (benchmarks/.peers/lm-eval) at first use, and its hf backend is
given the same rows, prompts, model, precision, cores and settings of the machine. Each side runs in a process of its
own; time is counted from the first request to the last answer, without loading. A round is ours and then the harness at
each batch size, of which its best counts; the figure is the median over the rounds of ours by theirs. BANKING77 is the
folder with test.csv (https://github.com/PolyAI-LDN/task-specific-datasets).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environments import HERE, own_environment, peers_environment, python_of, run

SYSTEM = "Name the intent of the customer's message. Answer with the intent alone."
LIMIT, OFFERED = 16, 10
PEER = HERE / "peers" / "lm_eval_labels.py"
PINS = ("lm_eval==0.4.13", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.0", "datasets==5.2.0")


def rows_of(count: int, choices: int, renderer: Any, precision: str) -> list[dict[str, Any]]:
    """Test rows as both sides are given them: the prompt under the chat template as text, ten intents to choose of."""
    from tunesmith.conversation.message import Message

    with (Path(os.environ["BANKING77"]) / "test.csv").open(encoding="utf-8", newline="") as file:
        read = list(csv.DictReader(file))
    step = max(1, len(read) // count)
    labels = sorted({row["category"] for row in read})
    found = []
    for number, row in enumerate(read[::step][:count]):
        ids = renderer.prompt([Message("system", SYSTEM), Message("user", row["text"])])
        others = [x for x in labels if x != row["category"]]
        offered = [row["category"], *(others[(number * 7 + i) % len(others)] for i in range(OFFERED - 1))]
        found.append(
            {
                "prompt": renderer.tokenizer.decode(ids),
                "text": row["text"],
                "choices": offered if number < choices else [],
                "until": [renderer.tokenizer.decode([i]) for i in renderer.stop_ids],
                "limit": LIMIT,
                "precision": precision,
            }
        )
    return found


def ours(kind: str, file: str, name: str) -> None:
    """Our side, in a process of its own."""
    from tunesmith.conversation.message import Message
    from tunesmith.inference.subject import Ask, Continuation, Local
    from tunesmith.inference.transformers_engine import TransformersEngine
    from tunesmith.models.load import load_renderer
    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    found = machine()
    model = resolve(ModelSection(name=name))
    renderer = load_renderer(model)
    read = [json.loads(line) for line in Path(file).read_text().splitlines()]
    local = Local(name, TransformersEngine(model, found, precision=read[0]["precision"]), renderer)
    started, worked = time.perf_counter(), time.process_time()
    if kind == "answers":
        asks = [Ask((Message("system", SYSTEM), Message("user", row["text"]))) for row in read]
        answers: Any = [r.text for _, r in sorted(local.answers(asks, LIMIT, None, lambda _: None), key=lambda x: x[0])]
    else:
        pairs = [Continuation(row["prompt"], choice) for row in read for choice in row["choices"]]
        answers = [-score.nll for _, score in sorted(local.likelihoods(pairs, lambda _: None), key=lambda x: x[0])]
    told = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - worked}
    print("\n" + json.dumps(told | {"answers": answers}))


def agreement(kind: str, here: list[Any], there: list[Any]) -> float:
    """The share of answers that are the same, or of likelihoods that differ by less than 5%."""
    if kind == "answers":
        same = [a.strip() == b.strip() for a, b in zip(here, there, strict=True)]
    else:
        same = [abs(a - b[0]) < 0.05 * max(1.0, abs(a)) for a, b in zip(here, there, strict=True)]
    return sum(same) / len(same)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--choices", type=int, default=40, help="rows whose ten choices are scored")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", nargs="+", default=["8", "32"], help="lm-eval's batch sizes; its best counts")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--untold", action="store_true", help="lm-eval does without tiles that the machine hides")
    parser.add_argument("--ours", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.ours:
        ours(*asked.ours, asked.model)
        return
    if not (Path(os.environ.get("BANKING77", "")) / "test.csv").is_file():
        sys.exit("Set BANKING77 to the folder that holds BANKING77's test.csv.")
    from tunesmith.models.load import load_renderer
    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    environment, for_peers = own_environment(), peers_environment(asked.untold)
    python = str(python_of("lm-eval", PINS))
    precision = machine().precision if asked.precision == "auto" else asked.precision
    model = resolve(ModelSection(name=asked.model))
    print(json.dumps({"machine": machine().as_dict(), "rows": asked.rows, "precision": precision}), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        made = rows_of(asked.rows, asked.choices, load_renderer(model), precision)
        file = Path(folder) / "rows.jsonl"
        for kind in ("answers", "choices"):
            taken = made if kind == "answers" else [row for row in made if row["choices"]]
            file.write_text("".join(json.dumps(row) + "\n" for row in taken))
            count = len(taken) * (1 if kind == "answers" else OFFERED)
            rounds = []
            for number in range(asked.rounds):
                mine = [sys.executable, __file__, "--model", asked.model, "--ours", kind, str(file)]
                here = run(mine, environment)
                peer = [python, str(PEER), str(model.path), str(file), kind]
                tried = {batch: run([*peer, batch], for_peers) for batch in asked.batch}
                batch, there = min(tried.items(), key=lambda found: found[1]["seconds"])
                speeds = count / here["seconds"], count / there["seconds"]
                rounds.append((speeds, agreement(kind, here["answers"], there["answers"])))
                work = there["cpu_seconds"] / here["cpu_seconds"]
                print(
                    f"{kind}, round {number}: ours {speeds[0]:.2f}/s; lm-eval {speeds[1]:.2f}/s (batches of {batch}); "
                    f"{speeds[0] / speeds[1]:.2f} times as fast, with {work:.2f} times less processor time; "
                    f"{rounds[-1][1]:.1%} agree",
                    flush=True,
                )
            ratios = sorted(mine / theirs for (mine, theirs), _ in rounds)
            told = {
                "kind": kind,
                "asked": count,
                "median_ratio": round(statistics.median(ratios), 2),
                "ratios": [round(ratio, 2) for ratio in ratios],
                "ours_per_second": round(statistics.median(mine for (mine, _), _ in rounds), 2),
                "lm_eval_per_second": round(statistics.median(theirs for (_, theirs), _ in rounds), 2),
                "agree": round(min(share for _, share in rounds), 4),
                "versions": there["versions"],
            }
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
