"""Which of a model's weights are matrices that a token is multiplied with: linear layers, and a mixture's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = (nn.Linear, FalconLinear, Conv1D)  # x W^T + b and no more; Conv1D, GPT-2's, holds W the other way round
PICKED = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts")  # what configurations call it


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Every linear layer but the output layer, by name."""
    heads = _heads(model)
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and id(m) not in heads}


def shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The (out, in) of every linear layer but the output layer, by name."""
    return {name: shape(m) for name, m in linear_layers(model).items()}


def shape(layer: Any) -> tuple[int, int]:
    """A linear layer's (out, in), however its weight lies."""
    return (layer.nf, layer.nx) if isinstance(layer, Conv1D) else (layer.out_features, layer.in_features)


def experts(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The matrices of a mixture's experts [experts, ., .], by name."""
    return {name: p for name, p in model.named_parameters() if ".experts." in name and p.ndim == 3}


def products(model: PreTrainedModel) -> dict[str, int]:
    """How many weights a token is multiplied with, by module: those of linear layers, routers and the experts that a
    token is given to. Neither embeddings nor the output layer count."""
    heads, each = _heads(model), picked(model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or id(module) in heads:
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            rows, columns = shape(module)
            found[name] = rows * columns
        elif name.endswith(".experts"):
            matrices = [p for p in module.parameters(recurse=False) if p.ndim == 3]
            found[name] = sum(p[0].numel() * each for p in matrices)
        else:
            found[name] = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim > 1)
    return {name: count for name, count in found.items() if count}


def _heads(model: PreTrainedModel) -> set[int]:
    return {id(model.get_output_embeddings()), id(getattr(model, "score", None))}


def picked(model: PreTrainedModel) -> int:
    """To how many experts of a layer a token is given: all, where the configuration does not say; 0 without any."""
    config, most = model.config.get_text_config(), max(map(len, experts(model).values()), default=0)
    return min(next((n for key in PICKED if isinstance(n := getattr(config, key, None), int)), most), most)
