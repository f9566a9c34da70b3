"""lm-evaluation-harness's hf backend on the same rows: answers (generate_until) or choices (loglikelihood).

Called by benchmarks/evaluation.py in an environment of its own; prints one JSON line: seconds from the first
request to the last answer (loading is not counted), also of processor time, the answers, and versions.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lm_eval
import tiles  # noqa: F401
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM


def main(model: str, rows: str, kind: str, batch: str) -> None:
    read: list[dict[str, Any]] = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    precision = read[0]["precision"]
    lm = HFLM(pretrained=model, dtype=precision, device="cpu", batch_size=batch if batch == "auto" else int(batch))
    if kind == "answers":
        arguments = [(r["prompt"], {"until": r["until"], "max_gen_toks": r["limit"], "do_sample": False}) for r in read]
        requests = [Instance("generate_until", {}, a, i) for i, a in enumerate(arguments)]
        ask = lm.generate_until
    else:
        pairs = [(r["prompt"], choice) for r in read for choice in r["choices"]]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        ask = lm.loglikelihood
    with torch.inference_mode():
        started, worked = time.perf_counter(), time.process_time()
        found = ask(requests, disable_tqdm=True)
        seconds, cpu = time.perf_counter() - started, time.process_time() - worked
    versions = {module.__name__: module.__version__ for module in (lm_eval, torch, transformers)}
    print("\n" + json.dumps({"seconds": seconds, "cpu_seconds": cpu, "answers": found, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:5])
