"""Bottleneck adapters: small networks between a decoder layer's parts, saved and loaded by Tunesmith itself.

After a part (Houlsby et al. 2019, arXiv:1902.00751: attention and MLP; Pfeiffer et al. 2021, arXiv:2005.00247: MLP
only) y becomes y + s U f(D y); beside the MLP (He et al. 2022, arXiv:2110.04366) y becomes y + s U f(D x). U starts at
zero, so that the model starts as it was. What lies between D and U bends, so nothing can be merged into the base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.runs import write_json

CONFIG, WEIGHTS, NAME = "bottleneck.json", "bottleneck.safetensors", "bottleneck"
Style = Literal["houlsby", "pfeiffer", "parallel"]
PARTS = {"attention": ("self_attn", "attn", "attention", "self_attention"), "mlp": ("mlp", "feed_forward", "ffn")}
BENDS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Bottleneck(nn.Module):
    """x [..., width] -> scale * U f(D x), in the weights' own float32."""

    def __init__(self, width: int, size: int, bend: str, scale: float, device: Any) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=device, dtype=torch.float32)
        self.up = nn.Linear(size, width, device=device, dtype=torch.float32)
        self.bend, self.scale = BENDS[bend](), scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.scale * self.up(self.bend(self.down(x.float())))
        return found.to(x.dtype)


def attach(model: Any, style: Style, size: int, bend: str, scale: float) -> Any:
    """Put a bottleneck at each place that the style names (in place) and freeze everything else.

    Raises:
        ModelError: the model's layers have no part of a known name there.
    """
    model.requires_grad_(False)
    if hasattr(model, "score"):  # a new head has to be learnt too
        model.score.float().requires_grad_(True)
    device, width = next(model.parameters()).device, model.config.get_text_config().hidden_size
    places = list(_places(model, ("attention", "mlp") if style == "houlsby" else ("mlp",)))
    for part in places:
        part.add_module(NAME, Bottleneck(width, size, bend, scale, device))
        part.register_forward_hook(_beside if style == "parallel" else _after, with_kwargs=True)
    model.bottleneck = {"style": style, "size": size, "bend": bend, "scale": scale}
    return model


def save(model: Any, folder: Path) -> None:
    """Write the bottlenecks' weights, and how they are built in."""
    weights = {n: p.detach().contiguous() for n, p in model.named_parameters() if _own(n)}
    save_file(weights, folder / WEIGHTS)
    write_json(folder / CONFIG, model.bottleneck)


def load(model: Any, folder: str | Path) -> Any:
    """A base with the bottlenecks that `save` wrote.

    Raises:
        ModelError: they are of a model with other layers.
    """
    model = attach(model, **json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8")))
    fill(model, load_file(Path(folder) / WEIGHTS), folder)
    return model


def fill(model: Any, weights: dict[str, Tensor], where: Any) -> None:
    """Copy saved weights into the bottlenecks of a model."""
    own = {n: p for n, p in model.named_parameters() if _own(n)}
    if {n: p.shape for n, p in own.items()} != {n: w.shape for n, w in weights.items()}:
        raise ModelError(
            "the adapter's bottlenecks are of other layers than the model has",
            where=str(where),
            fix="Use the base that it was trained on.",
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def _own(name: str) -> bool:
    return f".{NAME}." in name or name.startswith("score.")


def _places(model: Any, parts: tuple[str, ...]) -> Iterator[nn.Module]:
    layers = model.config.get_text_config().num_hidden_layers
    decoder: Any = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers), [])
    for number, layer in enumerate(decoder):
        children = dict(layer.named_children())
        for part in parts:
            named = next((children[name] for name in PARTS[part] if name in children), None)
            if named is None:
                raise ModelError(
                    f"layer {number} has no {part} of a known name",
                    where="train.adapter",
                    fix=f"Its parts are called: {', '.join(children)}. Take lora for this model.",
                )
            yield named
    if not decoder:
        raise ModelError("the model has no list of layers", where="train.adapter", fix="Take lora for this model.")


def _after(module: Any, given: Any, named: Any, out: Any) -> Any:
    y = out[0] if isinstance(out, tuple) else out
    y = y + module.bottleneck(y)
    return (y, *out[1:]) if isinstance(out, tuple) else y


def _beside(module: Any, given: Any, named: Any, out: Any) -> Any:
    x = given[0] if given else named["hidden_states"]
    y = (out[0] if isinstance(out, tuple) else out) + module.bottleneck(x)
    return (y, *out[1:]) if isinstance(out, tuple) else y
