"""The output layer's loss, a chunk of tokens at a time, so that memory does not grow with the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS = 2**24  # in memory at once: 64 MiB as float32


def tokens_at_once(vocabulary: int) -> int:
    """How many tokens' logits are made together: 256, or so many times halved that they are no more than LOGITS."""
    tokens = 256
    while tokens > 8 and tokens * vocabulary > LOGITS:
        tokens //= 2
    return tokens


class _FrozenHeadLoss(torch.autograd.Function):
    """Per-token negative log-likelihood of a frozen output layer.

    Each token's gradient with respect to its hidden state is made in the forward pass, while its logits
    are there; backward only scales it. What is kept is [N, D], never [N, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        smoothing: float,
        hits: list[Tensor] | None,
    ) -> Tensor:
        want = ctx.needs_input_grad[0]
        losses, gradients, size = [], [], tokens_at_once(len(weight_VD))
        for h, target in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
            logits = F.linear(h, weight_VD, bias_V)
            if hits is not None:
                hits.append(logits.argmax(-1) == target)
            # Softmax computes in float32 inside; only where nothing is trained is its result worth twice the memory.
            log_p = torch.log_softmax(logits if want else logits.float(), -1)
            picked = log_p.gather(1, target[:, None]).float()
            loss = -picked[:, 0]
            if smoothing:
                loss = (1 - smoothing) * loss - smoothing * log_p.mean(-1, dtype=torch.float32)
            losses.append(loss)
            del log_p
            if want:
                p = torch.softmax(logits, -1)
                at_target = torch.expm1(picked)  # p - 1, exact where p is close to 1
                if smoothing:
                    p.sub_(smoothing / p.shape[1])
                    at_target += smoothing * (1 - 1 / p.shape[1])
                gradients.append(p.scatter_(1, target[:, None], at_target.to(p.dtype)) @ weight_VD)
        if want:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_ND,) = ctx.saved_tensors
        return (gradient_ND * grad_outputs[0][:, None].to(gradient_ND.dtype), None, None, None, None, None)


def head_nll(
    hidden_ND: Tensor,
    head: torch.nn.Linear,
    targets_N: Tensor,
    smoothing: float = 0.0,
    hits: list[Tensor] | None = None,
) -> Tensor:
    """Negative log-likelihood [N] in nats of `targets` under an output layer, in bounded memory.

    With `smoothing`, of targets that keep 1 - smoothing and give the rest to all tokens alike. `hits` is given which
    targets are the likeliest tokens, [n] at a time.
    """
    if type(head) is torch.nn.Linear and not any(p.requires_grad for p in head.parameters()):
        loss: Tensor = _FrozenHeadLoss.apply(hidden_ND, head.weight, head.bias, targets_N, smoothing, hits)
        return loss

    def chunk(h: Tensor, target: Tensor) -> Tensor:
        logits = head(h).float()
        if hits is not None:
            hits.append(logits.detach().argmax(-1) == target)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    size = tokens_at_once(getattr(head, "out_features", 0))
    chunks = zip(hidden_ND.split(size), targets_N.split(size), strict=True)
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False) for h, t in chunks])
