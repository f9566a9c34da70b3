"""The weights that are trained: in float32, whatever the model computes in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set

import torch
from torch import Tensor, nn


class Trained:
    """What is trained of a model, by name.

    Attributes:
        weights: the float32 weights that an optimizer moves. Where the model computes in float32 they are its own;
            elsewhere they are the masters of rounded copies in it, and get the sum of their gradients.
        model: the model's own.
        exact: of the model's weights that a rounded copy stands for, the float32 ones: masters, and what of the frozen
            weights would lose digits.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = dict(self.model)
        self.exact: list[tuple[nn.Parameter, Tensor]] = []

    def round_to(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Have a float32 model compute in `dtype`, but for what must stay float32 as transformers says; what is trained
        of it keeps float32 masters."""
        leave = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        for name, parameter in model.named_parameters():
            if parameter.dtype != torch.float32 or dtype == torch.float32 or any(part in name for part in leave):
                continue
            whole = parameter.detach()
            rounded = whole.to(dtype)
            if name in self.model:
                self.weights[name] = master = nn.Parameter(whole)
                parameter.register_post_accumulate_grad_hook(_adding_to(master))
                self.exact.append((parameter, master.data))
            elif not torch.equal(rounded.float(), whole):
                self.exact.append((parameter, whole))
            parameter.data = rounded

    @torch.no_grad()
    def show(self) -> None:
        """Put the weights, rounded, into the model."""
        for name, parameter in self.model.items():
            if self.weights[name] is not parameter:
                parameter.copy_(self.weights[name])

    def only(self, names: Set[str], optimizer: torch.optim.Optimizer) -> None:
        """Train these for now. What is left out keeps its value, and no state of the optimizer's."""
        for name, parameter in self.model.items():
            parameter.requires_grad_(name in names)
            if name not in names:
                optimizer.state.pop(self.weights[name], None)

    @contextlib.contextmanager
    def as_used(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within this, the model holds the weights as they are meant to be used: an optimizer that averages its steps
        puts the averages there. After it, everything is bit for bit as before."""
        show, go_on = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
        if show is None or go_on is None:
            yield
            return
        kept: list[Tensor] = [weight.detach().clone() for weight in self.weights.values()]
        show()
        self.show()
        try:
            yield
        finally:
            go_on()
            torch._foreach_copy_([weight.detach() for weight in self.weights.values()], kept)
            self.show()

    @contextlib.contextmanager
    def unrounded(self) -> Iterator[None]:
        """Within this, the model holds the float32 weights: what is saved is not rounded."""
        rounded = [parameter.data for parameter, _ in self.exact]
        for parameter, whole in self.exact:
            parameter.data = whole
        try:
            yield
        finally:
            for (parameter, _), data in zip(self.exact, rounded, strict=True):
                parameter.data = data


def _adding_to(master: nn.Parameter) -> Callable[[Tensor], None]:
    """What moves a rounded weight's gradient to its master, where packs' gradients are added in float32."""

    def add(parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None:
            master.grad = gradient.float() if master.grad is None else master.grad.add_(gradient)
            parameter.grad = None

    return add
