"""Decoder layers whose activations are computed again in the backward pass instead of being kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.errors import ModelError


def recompute_layers(model: torch.nn.Module) -> list[GradientCheckpointingLayer]:
    """Keep only the inputs of each decoder layer, in training; returns those layers.

    Raises:
        ModelError: the model has no layers that transformers can compute again.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            "has no layers that can be computed again",
            where="train.speed.activations",
            fix="Set it to keep, and train.pack_tokens lower.",
        )
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = _again
    return layers


def _again(forward: Callable[..., Any], *args: Any) -> Any:
    """A layer's output. How rows lie in the sequence is a context variable: the second time needs the first one's."""
    return checkpoint(partial(copy_context().run, forward), *args, use_reentrant=False)


def waiting(offload: bool, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Within this, what is saved for the backward pass waits in the computer's memory, if `offload`."""
    if not offload:
        return contextlib.nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
