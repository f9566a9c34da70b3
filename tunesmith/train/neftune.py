"""NEFTune: noise on the embeddings, in training only (Jain et al. 2023, arXiv:2310.05914, algorithm 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.models.attention import laid_out_now
from tunesmith.models.packed import PackedForward


def add_noise(forward: PackedForward, alpha: float) -> None:
    """Have a model's embedding layer add noise from [-1, 1] alpha / sqrt(L D) to a row of L tokens and width D. Each
    row gets its own, also where rows begin alike."""
    forward.share = False

    def noisy(module: nn.Module, given: Any, out: Tensor) -> Tensor:
        if not module.training:
            return out
        layout = laid_out_now()
        lengths = [row.length for row in layout.rows] if layout else [out.shape[-2]]
        sizes = torch.tensor([alpha / (length * out.shape[-1]) ** 0.5 for length in lengths for _ in range(length)])
        sizes = F.pad(sizes, (0, out.shape[-2] - len(sizes)))  # none on what fills the sequence up
        return out + torch.empty_like(out).uniform_(-1, 1) * sizes.to(out.device, out.dtype)[:, None]

    forward.model.get_input_embeddings().register_forward_hook(noisy)
