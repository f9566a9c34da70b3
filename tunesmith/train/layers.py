"""Where in a decoder a weight stands, read from its name."""

from __future__ import annotations

from collections.abc import Container, Iterable


def layer_of(name: str) -> int | None:
    """The decoder layer that a weight of this name is in, counted from 0; None outside of them."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def depths(names: Iterable[str]) -> dict[str, int]:
    """How far above the input each weight stands: 0 for what lies before the first decoder layer (embeddings), 1 for
    that layer, and one more than the last layer's for what follows it. Names come in the model's order."""
    found: dict[str, int] = {}
    last = 0
    for name in names:
        layer = layer_of(name)
        found[name] = last + 1 if layer is None and last else 0 if layer is None else layer + 1
        last = max(last, layer + 1) if layer is not None else last
    return found


def reached(names: Iterable[str], trained: Container[str]) -> int:
    """Through how many decoder layers gradients go: from the lowest that holds one of the `trained` among a model's
    weights, or follows it, up to the last. `names` come in the model's order; PEFT's virtual tokens, last of all, stand
    before the first layer."""
    heights = depths(names)
    last = max((height for name, height in heights.items() if layer_of(name) is not None), default=0)
    lowest = min((0 if "prompt_encoder" in name else h for name, h in heights.items() if name in trained), default=0)
    return min(last, last + 1 - lowest)
