"""A frozen base whose linear layers lie in four or eight bits while adapters are trained on top (QLoRA, Dettmers et
al. 2023, arXiv:2305.14314).

Each weight is quantised as it is read from its file, and made whole only for a product and, again, for its gradient.
So the base is small in memory from the start, and a layer computes the same in training and in evaluation.
bitsandbytes or torchao turn numbers into bits and back; where the bits lie, and the products, are one module for all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tunesmith.errors import MachineError, ModelError
from tunesmith.models.matrices import PLAIN, experts, linear_layers, shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INT4 = getattr(torch, "int4")  # noqa: B009 (mypy does not know it)
METHOD = "tunesmith"  # under this name transformers' loader knows what is below


class Nf4:
    """Normal floats of 4 bits in blocks of 64, whose scales are quantised themselves."""

    def quantise(self, weight: Tensor) -> tuple[Tensor, Any]:
        functional = import_module("bitsandbytes.functional")
        bits, state = functional.quantize_4bit(
            weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        return bits, state

    def whole(self, bits: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        weight: Tensor = import_module("bitsandbytes.functional").dequantize_4bit(bits, state)
        return weight.to(dtype)


class Int8:
    """Whole numbers of 8 bits, one scale a row."""

    def quantise(self, weight: Tensor) -> tuple[Tensor, Any]:
        bits, largest, _ = import_module("bitsandbytes.functional").int8_vectorwise_quant(weight.half())
        return bits, [(largest / 127)[:, None]]

    def whole(self, bits: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        return bits.to(dtype).mul_(state[0].to(dtype))


class TorchaoInt8:
    """torchao's weight-only int8: one scale a row."""

    def quantise(self, weight: Tensor) -> tuple[Tensor, Any]:
        ao = import_module("torchao.quantization")
        made = ao.Int8Tensor.from_hp(weight, ao.PerRow())
        return made.qdata, [made.scale.reshape(-1, 1)]

    def whole(self, bits: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        return bits.to(dtype).mul_(state[0].to(dtype))


class TorchaoInt4:
    """torchao's weight-only int4, one scale and zero a group, two values laid into a byte."""

    def quantise(self, weight: Tensor) -> tuple[Tensor, Any]:
        ao = import_module("torchao.quantization")
        group = next((size for size in (32, 16, 8, 4) if weight.shape[1] % size == 0), weight.shape[1])
        made = ao.IntxUnpackedToInt8Tensor.from_hp(
            weight,
            block_size=(1, group),
            target_dtype=INT4,
            mapping_type=ao.MappingType.ASYMMETRIC,
        )
        values = (made.qdata + 8).to(torch.uint8)
        if values.shape[1] % 2:
            values = F.pad(values, (0, 1))
        bits = values[:, 0::2] | values[:, 1::2] << 4
        return bits, [made.scale, made.zero_point.to(torch.int8), weight.shape[1]]

    def whole(self, bits: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
        scale, zero, width = state
        values = torch.stack((bits & 15, bits >> 4), -1).flatten(1)[:, :width].to(torch.int8).sub_(8)
        groups = values.unflatten(1, (scale.shape[1], -1)).to(dtype).sub_(zero[:, :, None].to(dtype))
        return groups.mul_(scale[:, :, None].to(dtype)).flatten(1)


@dataclass(frozen=True)
class Format:
    """How weights lie: who quantises them, the bits that one takes with its share of the scales, and who that needs."""

    coder: Nf4 | Int8 | TorchaoInt8 | TorchaoInt4
    bits: float
    library: str


FORMATS = {
    "nf4": Format(Nf4(), 4.127, "bitsandbytes"),
    "int8": Format(Int8(), 8.05, "bitsandbytes"),
    "int4-torchao": Format(TorchaoInt4(), 5.25, "torchao"),
    "int8-torchao": Format(TorchaoInt8(), 8.05, "torchao"),
}


class QuantLinear(nn.Linear):
    """A frozen linear layer whose `weight` holds the bits of an [out, in] matrix.

    Attributes:
        turned: whether files have that matrix as [in, out].
    """

    def __init__(self, like: Any, coder: Any, lost_rank: int = 0) -> None:
        rows, columns = shape(like)
        with torch.device("meta"):
            super().__init__(columns, rows, like.bias is not None, dtype=like.weight.dtype)
        self.requires_grad_(False)
        self.coder, self.finite, self.turned = coder, True, isinstance(like, Conv1D)
        self.state: Any = None
        self.lost_rank = lost_rank
        self.lost: tuple[Tensor, Tensor] | None = None

    def fill(self, weight: Tensor) -> nn.Parameter:
        """The parameter that takes the place of a file's `weight`; its scales are kept beside it.

        With a `lost_rank`, so is the best picture of that rank of what the weight lost, as (B [out, r], A [r, in]).
        """
        weight = weight.T.contiguous() if self.turned else weight
        self.finite = bool(weight.sum(dtype=torch.float32).isfinite())
        bits, self.state = self.coder.quantise(weight)
        if self.lost_rank:
            left = weight.float() - self.whole(bits, torch.float32)
            u, s, v = torch.linalg.svd(left, full_matrices=False)
            root = s[: self.lost_rank].sqrt()
            self.lost = u[:, : self.lost_rank] * root, root[:, None] * v[: self.lost_rank]
        return nn.Parameter(bits, requires_grad=False)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a matrix [out, in]. PEFT calls it by this name where a layer has a `W_q`."""
        dtype = dtype or (self.bias.dtype if self.bias is not None else torch.float32)
        return self.whole(self.weight, dtype)

    def whole(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        """`dequantize` of bits that were kept from a forward pass."""
        weight: Tensor = self.coder.whole(bits, self.state, dtype)
        return weight

    @property
    def W_q(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self)
        return out

    def _apply(self, fn: Any, recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        device = self.weight.device
        if isinstance(self.state, list):
            self.state = [x.to(device) if isinstance(x, Tensor) else x for x in self.state]
        elif self.state is not None:
            self.state.to(device)
        return self


class _Product(torch.autograd.Function):
    """y = x W^T + b, with W made whole for it and again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole(layer.weight, x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        grad = grad_outputs[0]
        return grad @ ctx.layer.whole(ctx.layer.weight, grad.dtype), None


def quantisable(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers whose weights can lie in few bits, by name; none where they are less than half of the weights
    of all linear layers and experts."""
    layers = linear_layers(model)
    found = {name: layer for name, layer in layers.items() if type(layer) in PLAIN}
    others = [math.prod(shape(layer)) for name, layer in layers.items() if name not in found]
    others += [p.numel() for p in experts(model).values()]
    return found if sum(math.prod(shape(layer)) for layer in found.values()) >= sum(others) else {}


def refuse_large(model: PreTrainedModel) -> None:
    """Raise ModelError where hardly any of a model's weights would lie in few bits."""
    if not quantisable(model):
        raise ModelError(
            "most of this model's weights are a mixture's experts, or layers of a kind of their own, which can't lie "
            "in few bits",
            where="train.quantise",
            fix="Leave it out, or take a base of plain linear layers.",
        )


@register_quantization_config(METHOD)
class QuantiseConfig(QuantizationConfigMixin):
    """What `from_pretrained(quantization_config=...)` takes.

    Raises:
        MachineError: the library that makes this format is not installed.
    """

    def __init__(self, name: str = "nf4", lost_rank: int = 0, **others: Any) -> None:
        self.quant_method, self.name, self.lost_rank = METHOD, name, lost_rank
        library = FORMATS[name].library
        if find_spec(library) is None:
            raise MachineError(
                f"{name} needs {library}, which is not installed",
                where="train.quantise",
                fix=f"pip install 'tunesmith[{library}]'",
            )


@register_quantizer(METHOD)
class Quantiser(HfQuantizer):
    """Puts QuantLinear in the place of every linear layer but the output layer, and fills it as weights are read."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        coder = FORMATS[config.name].coder
        refuse_large(model)
        for name, layer in quantisable(model).items():
            model.set_submodule(name, QuantLinear(layer, coder, config.lost_rank))
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module, _, kind = param_name.rpartition(".")
        return kind == "weight" and isinstance(model.get_submodule(module), QuantLinear)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # What is left as it was read is a window on the whole file, which would stay in memory with it.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _Fill()

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Fill(ConversionOps):
    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        made = {}
        for name, value in input_dict.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            made[name] = layer.fill(value[0] if isinstance(value, list) else value)
        return made


def quantised(model: nn.Module) -> bool:
    """Whether some of a model's layers are."""
    return any(isinstance(m, QuantLinear) for m in model.modules())


def parameter_count(model: nn.Module) -> int:
    """How many weights a model has, counted before they are laid into bits."""
    packed = [m for m in model.modules() if isinstance(m, QuantLinear)]
    inside = sum(m.weight.numel() for m in packed)
    return sum(p.numel() for p in model.parameters()) - inside + sum(m.in_features * m.out_features for m in packed)


def weight_bytes(model: nn.Module) -> int:
    """What a model's weights take in memory, scales included."""
    found = {p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    return sum(found.values()) + sum(_state_bytes(m.state) for m in model.modules() if isinstance(m, QuantLinear))


def _state_bytes(state: Any) -> int:
    parts = state if isinstance(state, list) else [state.absmax, state.code, state.offset]
    if not isinstance(state, list) and state.state2 is not None:
        parts += [state.state2.absmax, state.state2.code]
    return sum(x.numel() * x.element_size() for x in parts if isinstance(x, Tensor))
