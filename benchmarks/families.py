"""What short ways (`train.speed.fused`) bring each family: a packed step with them and without, forward and backward.

    python benchmarks/families.py [--rounds 5] [--only gpt2 gemma] [--adapter full]

Four layers of SmolLM2-135M's width on 1,024 random tokens in eight rows, LoRA (for `mixtral, experts`: on the experts'
matrices), in the precision that the machine takes. Both ways alternate; told are the least processor time of either,
which other programs disturb least, and what autograd keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma": {"head_dim": 64},
    "phi3": {"pad_token_id": 0},
    "phi": {},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 3},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "mixtral": {"num_local_experts": 8},
    "mixtral, experts": {"num_local_experts": 8},
}
SIZE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 9}
EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    options.add_argument("--adapter", choices=["lora", "full"], default="lora")
    given = options.parse_args()

    from tunesmith.models.machine import machine

    here = machine()
    print(f"{here.cpu}, {here.precision}, {given.adapter}; least processor seconds of {given.rounds} rounds")
    for family in given.only:
        sides = [step(family, given.adapter, here.precision, fused) for fused in (False, True)]
        times: list[list[float]] = [[], []]
        for _ in range(given.rounds + 1):
            for side, (take, _, _) in zip(times, sides, strict=True):
                start = time.process_time()
                take()
                side.append(time.process_time() - start)
        plain, short = (min(side[1:]) for side in times)
        kept = [kept / 2**20 for _, kept, _ in sides]
        print(
            f"{family:18} {plain:.3f} -> {short:.3f} s ({plain / short:.2f}x), kept {kept[0]:.0f} -> {kept[1]:.0f} MiB"
            f"   {sides[1][2].partition('fused: ')[2]}",
            flush=True,
        )


def step(family: str, adapter: str, precision: str, fused: bool) -> tuple[Any, int, str]:
    """What takes a step, the bytes that autograd keeps in it, and how its forward goes."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from tunesmith.conversation.render import Rendered
    from tunesmith.models.packed import PackedForward
    from tunesmith.models.ways import Ways

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family.partition(",")[0],
        **{"vocab_size": 4096, "num_key_value_heads": 3, "max_position_embeddings": 2048} | SIZE | FAMILIES[family],
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, precision))
    if adapter == "lora":
        on = {"target_modules": [], "target_parameters": EXPERTS} if "experts" in family else {}
        model = get_peft_model(model, LoraConfig(r=16, **({"target_modules": "all-linear"} | on)))
    model.train()
    rows = [Rendered(torch.randint(5, 4000, (128,)).tolist(), [0.0] * 64 + [1.0] * 64) for _ in range(8)]
    forward = PackedForward(model, rows, ways=Ways(fused=fused))
    batch = forward.pack(rows)
    sizes: dict[int, int] = {}

    def count(t: Any) -> Any:
        sizes[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        forward.nll(batch).sum().backward()
    own = {p.data_ptr() for p in model.parameters()}

    def take() -> None:
        forward.nll(batch).sum().backward()
        model.zero_grad()

    return take, sum(size for at, size in sizes.items() if at not in own), forward.why


if __name__ == "__main__":
    main()
