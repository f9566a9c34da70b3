"""What holds a model near its start, as gradients and figures."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tunesmith.conversation.render import Rendered
from tunesmith.models.head import tokens_at_once
from tunesmith.models.packed import PackedForward
from tunesmith.progress import bar
from tunesmith.train.ranks import Ranks


@dataclass(frozen=True)
class Start:
    """A model as it is before its first step.

    Attributes:
        weights: what will be trained, by name.
        general: rows by the path that a recipe gave.
    """

    forward: PackedForward
    weights: Mapping[str, torch.nn.Parameter]
    general: Mapping[str, Sequence[Rendered]]
    seed: int
    ranks: Ranks = field(default_factory=Ranks)


class Term(ABC):
    """What is added to the loss at every step.

    Attributes:
        shared: whether each rank adds a part of the gradient, before the loss adds its own; the parts are then added up
            with the loss's. If not, every rank adds the whole when that has been done.
    """

    shared: ClassVar[bool] = False

    @abstractmethod
    def add(self, step: int) -> float:
        """Add the term's gradient to what is trained at this step (counted from 0), and return its value."""


class L2ToStart(Term):
    """weight / 2 |w - w0|^2; its figure is 1 / 2 |w - w0|^2."""

    def __init__(self, start: Start, weight: float) -> None:
        self.weight = weight
        self.pairs = [(w, w.detach().clone()) for w in start.weights.values()]

    def add(self, step: int) -> float:
        total = 0.0
        for w, before in self.pairs:
            away = w.detach() - before
            total += 0.5 * away.square().sum().item()
            if w.grad is not None:
                w.grad.add_(away, alpha=self.weight)
        return total


class FisherToStart(Term):
    """weight / 2 sum of F (w - w0)^2; its figure is that without the weight. F is the mean over rows of the squared
    gradient of a row's log-likelihood."""

    def __init__(self, start: Start, rows: Sequence[Rendered], weight: float) -> None:
        self.weight = weight
        weights = list(start.weights.values())
        self.held = [(w, w.detach().clone(), torch.zeros_like(w)) for w in weights]
        start.forward.model.eval()
        with bar("Fisher information", len(rows)) as progress:
            for row in rows:
                start.forward.nll(start.forward.pack([row])).sum().backward()
                for w, _, fisher in self.held:
                    if w.grad is not None:
                        fisher.addcmul_(w.grad, w.grad, value=1 / len(rows))
                        w.grad = None
                progress.advance()
        start.ranks.same(fisher for *_, fisher in self.held)

    def add(self, step: int) -> float:
        total = 0.0
        for w, before, fisher in self.held:
            away = w.detach() - before
            pull = fisher * away
            total += 0.5 * (pull * away).sum().item()
            if w.grad is not None:
                w.grad.add_(pull, alpha=self.weight)
        return total


class KlToStart(Term):
    """weight times the mean over tokens of KL(p0 || p); its figure is that mean, in nats, on the rows of the step, of
    which each rank takes some."""

    shared: ClassVar[bool] = True

    def __init__(self, start: Start, rows: Sequence[Rendered], weight: float, batch_size: int) -> None:
        self.forward, self.rows, self.weight, self.ranks = start.forward, rows, weight, start.ranks
        self.batch_size, self.seed = min(batch_size, len(rows)), start.seed
        self.forward.model.eval()
        self.before: list[Tensor] = []
        with torch.no_grad(), bar("Start of the replay rows", len(rows)) as progress:
            for row in rows:
                states, head = self.forward.predicting(self.forward.pack([row]))
                self.before.append(states)
                progress.advance()
        self.head_before = head
        if isinstance(head, torch.nn.Module) and any(p.requires_grad for p in head.parameters()):
            self.head_before = copy.deepcopy(head).requires_grad_(False)

    def add(self, step: int) -> float:
        draw = np.random.default_rng([self.seed, step, len(self.rows)])
        chosen = sorted(int(i) for i in draw.choice(len(self.rows), self.batch_size, replace=False))
        tokens = sum(len(self.before[i]) for i in chosen)
        mine = self.ranks.share(chosen, lambda i: len(self.rows[i]))[self.ranks.rank]
        return self.ranks.sum(self._add(mine, tokens) if mine else 0.0)

    def _add(self, chosen: Sequence[int], tokens: int) -> float:
        """What some of the step's rows add to the mean over its `tokens`."""
        was_training = self.forward.model.training
        self.forward.model.eval()  # no dropout and no noise: at the start, the divergence is zero
        states, head = self.forward.predicting(self.forward.pack([self.rows[i] for i in chosen]))
        before = torch.cat([self.before[i] for i in chosen])
        value = divergence(states, head, before, self.head_before).sum() / tokens
        (self.weight * value).backward()
        self.forward.model.train(was_training)
        return value.item()


Head = Callable[[Tensor], Tensor]


def divergence(states_ND: Tensor, head: Head, before_ND: Tensor, head_before: Head) -> Tensor:
    """KL(p0 || p) [N] in nats of the tokens that two states predict under two output layers, in bounded memory."""

    def chunk(h: Tensor, h0: Tensor) -> Tensor:
        now = F.log_softmax(head(h).float(), -1)
        with torch.no_grad():
            then = F.log_softmax(head_before(h0).float(), -1)
        return (then.exp() * (then - now)).sum(-1)

    size = tokens_at_once(getattr(head, "out_features", 0))
    chunks = zip(states_ND.split(size), before_ND.split(size), strict=True)
    return torch.cat([checkpoint(chunk, h, h0, use_reentrant=False) for h, h0 in chunks])
