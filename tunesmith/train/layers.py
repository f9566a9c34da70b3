"""Where in a decoder a weight stands, read from its name."""

from __future__ import annotations

from collections.abc import Iterable


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
