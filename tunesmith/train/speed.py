"""What a run's speed rests on, as a list for its start and its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.models.packed import PackedForward
    from tunesmith.train.section import TrainSection

ATTENTION = {
    "grouped": "attention of rows in groups",
    "rows": "attention row by row",
    "flash": "flash attention of variable lengths",
    "flex": "flex attention",
}
ACTIVATIONS = {
    "keep": "activations kept",
    "recompute": "activations of layers computed again",
    "offload": "activations of layers computed again, their inputs offloaded",
}


def used(section: TrainSection, forward: PackedForward, precision: str) -> list[str]:
    """The short ways that this run takes, in plain words."""
    packed = forward.packed
    _, fused, pieces = forward.why.partition("; not compiled")[0].partition("fused: ")
    optimizer = section.optimizer
    return [
        precision,
        "rows packed" if packed else forward.why,
        *(["shared beginnings once"] if packed and forward.share else []),
        *([ATTENTION[forward.kind]] if packed else []),
        f"fused {pieces}" if fused else "nothing fused",
        *(["compiled pieces"] if forward.compiled else []),
        ACTIVATIONS[section.speed.activations],
        f"optimizer {optimizer.kind}" + (", fused" if getattr(optimizer, "fused", False) else ""),
    ]
