"""Several LoRA adapters on one base at once: each row of a batch has its own, and one product serves them all.

The adapters' A lie below one another and their B beside one another. Of x A^T a row keeps the columns of its own
adapter; the others are set to 0 before B (what Punica and S-LoRA gather: Chen et al. 2023, arXiv:2310.18547; Sheng et
al. 2023, arXiv:2311.03285). Loading and unloading lay the stacks anew, between two steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.models.arrays import adapter_config, arrays, is_plain_lora, scale_of


class _Stacked(nn.Module):
    """A linear layer with the adapters' matrices on top: x [B, T, in] -> [B, T, out]."""

    def __init__(self, linear: nn.Linear, loras: Loras) -> None:
        super().__init__()
        self.linear = linear
        self._loras = [loras]  # in a list, since it is no part of the model
        self.low_RI: Tensor | None = None
        self.up_RO: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    def forward(self, x_BTI: Tensor) -> Tensor:
        mask_B1R = self._loras[0].mask
        if self.low_RI is None or self.up_RO is None or mask_B1R is None:
            return self.linear(x_BTI)
        small = ((x_BTI @ self.low_RI.T) * mask_B1R) @ self.up_RO
        # The small summand first: added to a result that is already rounded, it would vanish in bfloat16.
        out = small.flatten(0, -2).addmm_(x_BTI.flatten(0, -2), self.linear.weight.T).view(small.shape)
        return out if self.linear.bias is None else out.add_(self.linear.bias)


class Loras:
    """The adapters of one model.

    Attributes:
        mask: which columns each row of the next forward keeps [B, 1, R]; None for no adapter at all.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[str, _Stacked] = {}
        self._held: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self._columns: dict[str, slice] = {}
        self._width = 0
        self.mask: Tensor | None = None

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def add(self, name: str, folder: Path) -> None:
        """Load a PEFT LoRA folder.

        Raises:
            ModelError: it is no plain LoRA, or not for this model.
        """
        if not is_plain_lora(folder):
            raise ModelError(
                "is no plain LoRA adapter, and only those share a base",
                where=str(folder),
                fix="Package its run and serve that model by itself.",
            )
        found = self._read(folder)
        if not found:
            raise ModelError("holds no matrices", where=str(folder), fix="Train the adapter anew, or copy it again.")
        self._held[name] = found
        self._lay()

    def remove(self, name: str) -> None:
        del self._held[name]
        self._lay()

    def choose(self, adapters: Sequence[str | None]) -> None:
        """Say which adapter each row of the coming forwards has."""
        if not any(adapters):
            self.mask = None
            return
        some = next(iter(self._layers.values())).weight
        self.mask = some.new_zeros(len(adapters), 1, self._width)
        for row, name in enumerate(adapters):
            if name is not None:
                self.mask[row, :, self._columns[name]] = 1

    def _read(self, folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
        about = adapter_config(folder)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in arrays(folder):
            module, _, rest = key.removeprefix("base_model.model.").rpartition(".lora_")
            parts.setdefault(module, {})[rest[0]] = torch.from_numpy(value.copy())
        found = {}
        for module, part in parts.items():
            layer = self._linear(module)
            low, up = part.get("A"), part.get("B")
            if layer is None or low is None or up is None or (up.shape[0], low.shape[1]) != tuple(layer.weight.shape):
                raise ModelError(
                    f"does not fit this model at {module}",
                    where=str(folder),
                    fix="Use the base that the adapter was trained on.",
                )
            scale = scale_of(about, module, low.shape[0])
            found[module] = (low.to(layer.weight), (up * scale).T.to(layer.weight))
        return found

    def _linear(self, name: str) -> nn.Linear | None:
        if name in self._layers:
            return self._layers[name].linear
        try:
            found = self._model.get_submodule(name)
        except AttributeError:
            return None
        return found if isinstance(found, nn.Linear) else None

    def _lay(self) -> None:
        """Put every layer's matrices together anew."""
        self._columns, self._width = {}, 0
        for name, held in self._held.items():
            rank = max(low.shape[0] for low, _ in held.values())
            self._columns[name] = slice(self._width, self._width + rank)
            self._width += rank
        wanted = {module for held in self._held.values() for module in held}
        for module in wanted - self._layers.keys():
            self._wrap(module)
        for module, layer in self._layers.items():
            if module not in wanted:
                layer.low_RI = layer.up_RO = None
                continue
            weight = layer.linear.weight
            low = weight.new_zeros(self._width, weight.shape[1])
            up = weight.new_zeros(self._width, weight.shape[0])
            for name, held in self._held.items():
                if module in held:
                    start, (a, b) = self._columns[name].start, held[module]
                    low[start : start + len(a)], up[start : start + len(b)] = a, b
            layer.low_RI, layer.up_RO = low, up

    def _wrap(self, module: str) -> None:
        parent, _, name = module.rpartition(".")
        linear: Any = self._model.get_submodule(module)
        self._layers[module] = _Stacked(linear, self)
        setattr(self._model.get_submodule(parent), name, self._layers[module])
