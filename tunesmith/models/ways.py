"""The recipe's `train.speed`: which short ways a forward may take."""

from __future__ import annotations

from typing import Literal

from tunesmith.section import Section


class Ways(Section):
    """What makes steps fast or small. Each is taken where it suits the machine and gives the same numbers; what is used
    is printed at the start. `train.speed: auto` stands for the defaults."""

    packing: bool = True
    """Many rows in one forward pass."""
    shared: bool = True
    """What rows begin with alike is computed once."""
    fused: bool = True
    """Norms, gated MLPs, rotary attention, LoRA on layers and on experts as single steps; slow gelus as torch's own."""
    liger: bool = True
    """Those steps by Liger's kernels, on CUDA where liger-kernel is installed."""
    attention: Literal["auto", "grouped", "rows", "flash", "flex"] = "auto"
    """Of packed rows: rows of about the same length as batched products (grouped), torch's own row by row (rows), or,
    on CUDA, flash-attn's or torch's flex attention with variable lengths. auto: flash, flex, grouped, the first there
    is."""
    activations: Literal["keep", "recompute", "offload"] = "keep"
    """Of decoder layers: kept for the backward pass, computed again in it (less memory, a third more time), or computed
    again from inputs that wait in the computer's memory."""
    compile: bool = False
    """Norms and gates compiled by torch (needs a C++ compiler; takes up to a minute once). Where that fails, they are
    not."""
