"""Trained virtual tokens (prompt and P-tuning) as ids beyond the vocabulary, which every row begins with.

So they are packed, shared by all rows of a step, cached and decoded like any system prompt, and no other code knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class VirtualEmbedding(nn.Module):
    """A vocabulary's embeddings, and beyond them those of n virtual tokens.

    Args:
        own: the model's own.
        virtual: gives the others, [n, D].
    """

    def __init__(self, own: nn.Embedding, virtual: Callable[[], Tensor]) -> None:
        super().__init__()
        self.own, self.virtual = own, virtual

    @property
    def weight(self) -> Tensor:
        return self.own.weight

    def forward(self, ids: Tensor) -> Tensor:
        first = self.own.weight.shape[0]
        found: Tensor = self.own(ids.clamp(max=first - 1))
        if not bool((ids >= first).any()):
            return found
        virtual = self.virtual().to(found.dtype)
        beyond = nn.functional.embedding((ids - first).clamp(min=0), virtual)
        return torch.where((ids >= first)[..., None], beyond, found)


def install(tuned: Any) -> Any:
    """Let the base of a PEFT model with virtual tokens know them as ids, told in `virtual_ids`; returns the base.

    Nothing happens to one with trained keys and values (prefix tuning): those have no embeddings.
    """
    config = tuned.active_peft_config
    base = tuned.get_base_model()
    if config.peft_type not in ("PROMPT_TUNING", "P_TUNING"):
        return tuned
    own = base.get_input_embeddings()
    base.set_input_embeddings(VirtualEmbedding(own, lambda: tuned.get_prompt(batch_size=1)[0]))
    first = own.weight.shape[0]
    base.virtual_ids = list(range(first, first + config.num_virtual_tokens))
    return base
