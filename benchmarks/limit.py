"""What matrix products alone would allow on this machine, in the minute in which something else is measured."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch


def product_rate(shapes: Sequence[tuple[int, int]], precision: torch.dtype, tokens: int, turns: int = 8) -> float:
    """FLOP/s of products of `tokens` rows with weights of these shapes (out, in), each as often as it is there."""
    work = seconds = 0.0
    different: Collection[tuple[int, int]] = sorted(set(shapes))
    for shape in different:
        w, x = torch.randn(shape, dtype=precision), torch.randn(tokens, shape[1], dtype=precision)
        x @ w.T
        start = time.perf_counter()
        for _ in range(turns):
            x @ w.T
        share = shapes.count(shape)
        seconds += (time.perf_counter() - start) / turns * share
        work += 2 * tokens * w.numel() * share
    return work / seconds
