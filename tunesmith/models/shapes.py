"""Sizes that come again. bfloat16 products on a processor with AMX are compiled for their exact shape, some
milliseconds each; packs whose sizes are all different would spend more time on that than the products save. A little
padding that no row sees leaves few shapes."""

from __future__ import annotations

import torch

LOSSES = 64  # tokens with loss are counted in steps of so many


def few_shapes(device: str | torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this type are compiled for their shape here."""
    return torch.device(device).type == "cpu" and dtype == torch.bfloat16


def rounded(count: int) -> int:
    """`count` rounded up to one of eight sizes an octave (16 apart below 256)."""
    unit = max(16, 2 ** (count.bit_length() - 4))
    return -(-count // unit) * unit


def rounded_rows(count: int) -> int:
    """`count` rounded up to 1, 2, 3, 4, 6, 8, 12, 16, ...: two sizes an octave."""
    unit = max(1, 2 ** ((count - 1).bit_length() - 2))
    return -(-count // unit) * unit
