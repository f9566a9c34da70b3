"""How the cost of a training step grows with row length, adapter rank and model size, and how near it comes to what the
matrix products alone would allow on this machine.

    python benchmarks/growth.py [--steps 4] [--only length rank size]

Rows are random tokens of one length, a step is as many of them as make about 2,048 tokens, every token of the second
half carries loss. The limit is the step's matrix products (plan's count) at the rate that products of the model's own
shapes reach in the same minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from environments import own_environment, run

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
RANKS = (4, 16, 64, 192)
# hidden, intermediate, layers, heads, key heads
SIZES = {"30M": (320, 896, 8, 5, 5), "135M": (576, 1536, 30, 9, 3), "360M": (960, 2560, 32, 15, 5)}
ONE = """
import json, resource, sys, time
import tunesmith
from tunesmith.models.machine import machine
here = machine()
import torch
from limit import product_rate
from tunesmith.models.packed import PackedForward
from tunesmith.conversation.render import Rendered
from tunesmith.train.auto import with_pack
from tunesmith.train.objectives.method import Example
from tunesmith.train.parallel.alone import Alone, Step
from tunesmith.train.ranks import Ranks
from tunesmith.train.section import TrainSection
from tunesmith.train.step import gradients
from transformers import AutoConfig, AutoModelForCausalLM

given = json.loads(sys.argv[1])
hidden, wide, layers, heads, keys = given["size"]
torch.manual_seed(0)
config = AutoConfig.for_model("llama", vocab_size=49152, hidden_size=hidden, intermediate_size=wide,
    num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=keys, tie_word_embeddings=True,
    max_position_embeddings=8192)
precision = getattr(torch, here.precision)
model = AutoModelForCausalLM.from_config(config, dtype=precision).eval()
section = with_pack(TrainSection(adapter={"kind": "lora", "rank": given["rank"]}, max_length=8192), here)
shapes = [tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
adapted = section.adapter.attach(model)
count = max(1, 2048 // given["length"])
rows = []
for i in range(count):
    ids = torch.randint(5, 49000, (given["length"],)).tolist()
    half = len(ids) // 2
    rows.append(Example(str(i), (Rendered(ids, [0.0] * half + [1.0] * (len(ids) - half)),)))
forward = PackedForward(adapted, [row.sequences[0] for row in rows])
weights = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
trained = list(weights.values())
split = Alone(Ranks(), Step(adapted, forward, section.method), weights)
optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
adapted.train()

times, rates = [], []
for step in range(given["steps"] + 1):
    rates.append(product_rate(shapes, precision, min(1024, max(given["length"], 512))))
    start = time.perf_counter()
    gradients(section, split, rows, None, lambda: None)
    optimizer.step()
    optimizer.zero_grad()
    times.append(time.perf_counter() - start)
tokens = count * given["length"]
products = sum(a * b for a, b in shapes)
head = 49152 * hidden * tokens / 2
flops = tokens * (4 * products + 6 * sum(p.numel() for p in trained)) + 4 * head
median = lambda x: sorted(x)[len(x) // 2]
print(json.dumps({
    "tokens_per_second": tokens / median(times[1:]),
    "share_of_product_limit": flops / median(rates[1:]) / median(times[1:]),
    "gflops": median(rates[1:]) / 1e9,
    "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    "forward": forward.why,
}))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--only", nargs="+", default=["length", "rank", "size"], choices=["length", "rank", "size"])
    given = options.parse_args()
    base = {"length": 512, "rank": 16, "size": SIZES["135M"], "steps": given.steps}
    cases = {
        "length": [(str(n), base | {"length": n}) for n in LENGTHS],
        "rank": [(str(r), base | {"rank": r}) for r in RANKS],
        "size": [(name, base | {"size": size}) for name, size in SIZES.items()],
    }
    print("| what | value | tokens/s | share of the products' limit | GFLOP/s | peak GiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "one.py"
        script.write_text(ONE, encoding="utf-8")
        for what in given.only:
            for value, case in cases[what]:
                found = run([sys.executable, str(script), json.dumps(case)], own_environment())
                print(
                    f"| {what} | {value} | {found['tokens_per_second']:.0f} | {found['share_of_product_limit']:.2f} "
                    f"| {found['gflops']:.0f} | {found['peak_gib']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
