"""What the peers' scripts have in common: a Trainer's tokens and wall time from the first step's end on."""

import json
import resource
import time

import tiles  # noqa: F401
from transformers import Trainer, TrainerCallback


class Clock(TrainerCallback):
    """Wall time at each step's end; the first step, which warms up, is not counted."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        self.ends.append(time.perf_counter())


def count_tokens(trainer_class: type = Trainer) -> list[int]:
    """Real tokens of every micro-batch that is trained on from now."""
    seen: list[int] = []
    plain = trainer_class.training_step

    def counted(self, model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        seen.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        return plain(self, model, inputs, *args, **kwargs)

    trainer_class.training_step = counted
    return seen


def tell(seen: list[int], ends: list[float], versions: dict) -> None:
    per_step = len(seen) // len(ends)
    tokens, seconds = sum(seen[per_step:]), ends[-1] - ends[0]
    tell_rate(tokens, seconds, versions)


def tell_rate(tokens: int, seconds: float, versions: dict) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "peak_bytes": peak}
    print("\n" + json.dumps(found | {"versions": versions}))
