"""GaLore: pytorch-optimizer's, with a state that can be written down."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_optimizer import GaLore as Published
from pytorch_optimizer.optimizer.utils.galore import GaLoreProjector


class GaLore(Published):
    """AdamW on P^T G, where P are the first singular vectors of a matrix's gradient G, renewed now and then."""

    @classmethod
    def over(
        cls,
        groups: list[dict[str, Any]],
        rate: float,
        betas: tuple[float, float],
        rank: int,
        every: int,
        scale: float,
    ) -> GaLore:
        """Matrices inside the layers that are larger than `rank` both ways get the view, all other weights AdamW."""
        view = {"rank": rank, "update_proj_gap": every, "scale": scale, "projection_type": "std"}
        made = []
        for group in groups:
            small = [w for w in group["params"] if not group["hidden"] or min(w.shape) <= rank]
            large = [w for w in group["params"] if group["hidden"] and min(w.shape) > rank]
            made += [group | {"params": weights} | keys for weights, keys in ((large, view), (small, {})) if weights]
        return cls(made, lr=rate, betas=betas, eps=1e-8)

    def pack(self, state: dict[str, Any]) -> dict[str, Any]:
        """A weight's state as tensors and numbers."""
        packed = dict(state)
        projector = packed.pop("projector", None)
        if projector is not None:
            packed |= {"basis": projector.ortho_matrix, "renewed": projector.last_svd_step}
        return packed

    def unpack(self, weight: torch.Tensor, packed: dict[str, Any]) -> dict[str, Any]:
        """What `pack` made a state of, as it was."""
        if "basis" not in packed:
            return packed
        group = next(g for g in self.param_groups if any(weight is w for w in g["params"]))
        projector = GaLoreProjector(group["rank"], group["update_proj_gap"], group["scale"], group["projection_type"])
        projector.ortho_matrix, projector.last_svd_step = packed.pop("basis"), packed.pop("renewed")
        return packed | {"projector": projector}
