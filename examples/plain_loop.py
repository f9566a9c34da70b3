"""Tunesmith's training loop in one piece: to be read from top to bottom, and run.

    python examples/plain_loop.py RECIPE.yaml FOLDER

What `tunesmith train` does with a recipe of method sft and an adapter, without what surrounds it there: other methods
and optimizers, several ranks, a first try of the longest step, validation, checkpoints, what is noticed. The losses,
gradients and weights are the same. FOLDER gets the prepared rows (FOLDER/data) and the adapter (FOLDER/adapter).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import tunesmith
from tunesmith.models.machine import machine


def main(recipe_file: str, folder: Path) -> None:
    here = machine()  # measured once; sets what must be set before torch is loaded
    import torch

    from tunesmith import recipe
    from tunesmith.data.prepare import load_rows
    from tunesmith.models.load import load_model, load_renderer
    from tunesmith.models.packed import PackedForward
    from tunesmith.models.packs import packs
    from tunesmith.models.resolve import resolve
    from tunesmith.train import auto
    from tunesmith.train.batching import Schedule, learning_rate

    # Rows. The data stage accounts for each: accepted, rejected or removed. The renderer writes them as the model's
    # template does at inference, and gives each token its weight: 1 in an answer, with the token that ends it, else 0.
    made, beside = recipe.load(recipe_file)
    train = auto.with_pack(made.train, here)
    run = tunesmith.run(recipe_file, ["name=data"], runs_folder=folder, stages=("data",)).run
    rows = load_rows(run.stage("data") / "train.jsonl")
    name = beside / made.model.name
    base = resolve(made.model.model_copy(update={"name": str(name)}) if name.exists() else made.model)
    renderer = load_renderer(base)
    rendered = [renderer.render(row) for row in rows]

    # The model, frozen, with an adapter whose weights are float32 whatever the base's are. PackedForward compares
    # packed with one-by-one losses on a few rows, and goes one by one where they differ.
    precision = here.precision if train.precision == "auto" else train.precision
    frozen = load_model(base, getattr(torch, precision), here.device)
    torch.manual_seed(made.seed)
    model = train.adapter.attach(frozen)
    forward = PackedForward(model, rendered)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=train.weight_decay)
    print(f"{sum(map(torch.numel, trained)):,} weights are trained; {forward.why}")

    # The loop. A step is rows, drawn without replacement in an order that follows from the seed and the epoch. How
    # they are packed for the machine changes nothing: each pack adds its sum, divided by the whole step's weight.
    schedule = Schedule.of(len(rows), train.batch_size, train.epochs, train.max_steps, made.seed)
    model.train()
    for step in range(schedule.total):
        start = time.perf_counter()
        chosen = [rendered[i] for i in schedule.step(step)]
        weight = sum(sum(row.weights) for row in chosen)
        total = 0.0
        for group in packs(range(len(chosen)), [[row] for row in chosen], train.pack_tokens):
            pack = forward.pack([chosen[i] for i in group])  # rows end to end; what they all begin with is there once
            nll_N = forward.nll(pack)  # -log p in nats of the N tokens that carry weight, and no logits of others
            loss = (nll_N * pack.weights_N).sum() / weight
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(trained, train.clip).item()
        rate = learning_rate(step, schedule.total, train.learning_rate, train.warmup, train.schedule, train.decay)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        print(f"step {step + 1}: loss {total:.4f}, gradient {norm:.3f}, {sum(map(len, chosen)) / seconds:.0f} tokens/s")
    model.save_pretrained(folder / "adapter")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python examples/plain_loop.py RECIPE.yaml FOLDER")
    main(sys.argv[1], Path(sys.argv[2]))
