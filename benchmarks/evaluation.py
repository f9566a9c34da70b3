"""Answers a second on 500 test rows of BANKING77, and choices by likelihood, against lm-evaluation-harness.

Its hf backend is given the same rows, prompts, model, precision and cores; each side runs in a process of its own,
turn about, and the best of `--rounds` counts.

    BANKING77=.../banking77 python benchmarks/evaluation.py [--rows 500] [--choices 40] [--rounds 3]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SYSTEM = "Name the intent of the customer's message. Answer with the intent alone."
LIMIT = 16
PEER = Path(__file__).parent / "peers" / "lm_eval_labels.py"


def rows_of(count: int, choices: int, model: Any, renderer: Any, precision: str) -> list[dict[str, Any]]:
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
        offered = [row["category"], *(others[(number * 7 + i) % len(others)] for i in range(9))]
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
    started = time.perf_counter()
    if kind == "answers":
        asks = [Ask((Message("system", SYSTEM), Message("user", row["text"]))) for row in read]
        answers: Any = [r.text for _, r in sorted(local.answers(asks, LIMIT, None, lambda _: None))]
    else:
        pairs = [Continuation(row["prompt"], choice) for row in read for choice in row["choices"]]
        answers = [-score.nll for _, score in sorted(local.likelihoods(pairs, lambda _: None), key=lambda x: x[0])]
    seconds = time.perf_counter() - started
    print(json.dumps({"rows": len(read), "seconds": seconds, "answers": answers}))


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--choices", type=int, default=40, help="rows whose ten choices are scored")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", default="32", help="lm-eval's batch size; auto takes what fits")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--ours", nargs=2, metavar=("KIND", "FILE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.ours:
        ours(*asked.ours, asked.model)
        return
    from tunesmith.models.load import load_renderer
    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    precision = machine().precision
    model = resolve(ModelSection(name=asked.model))
    with tempfile.TemporaryDirectory() as folder:
        made = rows_of(asked.rows, asked.choices, model, load_renderer(model), precision)
        file = Path(folder) / "rows.jsonl"
        for kind in ("answers", "choices"):
            taken = made if kind == "answers" else [row for row in made if row["choices"]]
            file.write_text("".join(json.dumps(row) + "\n" for row in taken))
            best: dict[str, dict[str, Any]] = {}
            for _ in range(asked.rounds):
                here = run([__file__, "--model", asked.model, "--ours", kind, str(file)])
                there = run([str(PEER), str(model.path), str(file), kind, asked.batch])
                for side, result in (("tunesmith", here), ("lm-eval", there)):
                    if side not in best or result["seconds"] < best[side]["seconds"]:
                        best[side] = result
            count = len(taken) * (1 if kind == "answers" else 10)
            speeds = {side: count / result["seconds"] for side, result in best.items()}
            if kind == "answers":
                pairs = zip(best["tunesmith"]["answers"], best["lm-eval"]["answers"], strict=True)
                agree = sum(a.strip() == b.strip() for a, b in pairs) / count
            else:
                pairs = zip(best["tunesmith"]["answers"], best["lm-eval"]["answers"], strict=True)
                agree = sum(abs(a - b[0]) < 0.05 * max(1.0, abs(a)) for a, b in pairs) / count
            print(
                f"{kind}: tunesmith {speeds['tunesmith']:.2f}/s, lm-eval {speeds['lm-eval']:.2f}/s, "
                f"{speeds['tunesmith'] / speeds['lm-eval']:.2f} times as fast; {agree:.1%} agree ({precision})"
            )


if __name__ == "__main__":
    main()
