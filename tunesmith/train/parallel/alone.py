"""What the training loop works through: here for one rank, whose weights are all its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.conversation.render import Rendered
from tunesmith.models.packed import PackedForward
from tunesmith.models.packs import Pack, packs
from tunesmith.train.objectives.method import Batch, Loss, Method
from tunesmith.train.optimizers import state
from tunesmith.train.ranks import Ranks

Weights = dict[str, nn.Parameter]


def trained(model: nn.Module) -> Weights:
    """What is trained of a model, by its name there."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class Step(nn.Module):
    """A pack's loss as a module's call, which is where DDP, FSDP and DeepSpeed hook in.

    Args:
        model: with what is trained of it marked.
        method: whose loss it is.
    """

    def __init__(self, model: nn.Module, packed: PackedForward, method: Method) -> None:
        super().__init__()
        self.model, self.packed, self.method = model, packed, method

    def forward(self, batch: Batch | Pack) -> Any:
        """A loss's terms and what it tells, as containers that the hooks look into; or a pack's losses."""
        if isinstance(batch, Pack):
            return self.packed.nll(batch)
        loss = self.method.loss(self.packed, batch)
        return loss.terms, loss.told


@dataclass(frozen=True)
class Turn:
    """A pack of a rank: its examples by number, whether it counts, and whether it is the rank's last."""

    group: list[int]
    counts: bool
    last: bool


class Alone:
    """The model, what is trained of it and its optimizer, as the loop sees them.

    Attributes:
        run: the step's module, wrapped.
        weights: what is trained, by its name in the model; of parted ones, this rank's part.
        shapes: of the whole ones.

    Subclasses say what is different where several ranks train; every method but `__call__` and `backward` is then
    called by all of them, or by none.
    """

    whole_here = True
    """Whether each rank has all weights between steps."""

    def __init__(self, ranks: Ranks, step: Step, weights: Weights) -> None:
        self.ranks, self.step, self.weights = ranks, step, weights
        self.model: Any = step.model
        self.run: nn.Module = step
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self.optimizer: torch.optim.Optimizer

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer that was made for `weights`, in place of an earlier one if there is one."""
        self.optimizer = optimizer

    def turns(self, sequences: Sequence[Sequence[Rendered]], capacity: int, shared: bool = True) -> list[Turn]:
        """This rank's share of sets of sequences that belong together, in packs (all of them where not `shared`).

        Every rank gets equally many, since gathering weights takes all of them: where this one has fewer, the
        shortest set is computed for nothing. A model that takes sequences one by one gets one set at a time.
        """
        everything = range(len(sequences))
        shares = self.ranks.share(everything, lambda i: sum(map(len, sequences[i]))) if shared else [list(everything)]
        if self.ranks.world > 1 and not self.step.packed.together(
            max(len(s) for rows in sequences for s in rows) + len(self.step.packed.virtual_ids)
        ):
            capacity = 1
        parts = [packs(share, sequences, capacity) if share else [] for share in shares]
        mine, most = parts[self.ranks.rank if shared else 0], max(map(len, parts))
        shortest = min(everything, key=lambda i: sum(map(len, sequences[i])))
        groups = mine + [[shortest]] * (most - len(mine))
        return [Turn(group, n <= len(mine), n == most) for n, group in enumerate(groups, 1)]

    def __call__(self, batch: Batch, last: bool = False) -> Loss:
        """The loss of a pack.

        Args:
            last: whether it is the step's last one, after whose backward pass every rank's gradients are added up.
        """
        return Loss(*self.run(batch))

    def nll(self, pack: Pack) -> Tensor:
        """What `PackedForward.nll` gives, for a method that looks at more than it trains on."""
        losses: Tensor = self.run(pack)
        return losses

    def backward(self, loss: Tensor) -> None:
        """Add a pack's gradients to the step's."""
        loss.backward()

    def clip(self, limit: float) -> float:
        """Scale the step's gradient to a norm of `limit` at most; returns what it was."""
        norm: Tensor = torch.nn.utils.clip_grad_norm_(list(self.weights.values()), limit)
        return norm.item()

    def update(self) -> None:
        """Take the step."""
        self.optimizer.step()

    def forget(self) -> None:
        """Drop the step's gradients."""
        self.optimizer.zero_grad()

    def norms(self) -> Tensor:
        """The norm of each trained tensor."""
        return torch.stack(torch._foreach_norm(list(self.weights.values())))

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        """The model as if one rank had trained it, for the first rank to save."""
        yield self.model

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """For a checkpoint: `weight/NAME` and `optimizer/WHAT/NAME`, whole, whatever the number of ranks; and the
        optimizer's numbers."""
        found = {f"weight/{name}": self.gathered(weight.detach()) for name, weight in self.weights.items()}
        moments, facts = state.packed(self.optimizer, self.weights)
        return found | {f"optimizer/{key}": self.gathered(value) for key, value in moments.items()}, facts

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take over what `state` gave, at this or another number of ranks."""
        for name, weight in self.weights.items():
            weight.copy_(self.part(tensors[f"weight/{name}"], weight))
        moments = {key.removeprefix("optimizer/"): value for key, value in tensors.items() if key.startswith("opt")}
        parts = {key: self.part(value, self.weights[key.partition("/")[2]]) for key, value in moments.items()}
        state.unpack(self.optimizer, self.weights, parts, facts)

    def gathered(self, tensor: Tensor) -> Tensor:
        """A tensor of `weights` or of the optimizer's state, whole."""
        return tensor.contiguous()

    def part(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """What this rank keeps of a whole tensor that belongs to a parameter."""
        return whole


def of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The optimizer's state of a weight, by what it is."""
    keys = {key: key.split("/", 2) for key in tensors if key.startswith("optimizer/")}
    return {what: tensors[key] for key, (_, what, whose) in keys.items() if whose == name}


def parted_norms(parts: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor of which every rank has a part."""
    squares = torch.stack(torch._foreach_norm(list(parts))).square_()
    torch.distributed.all_reduce(squares)
    return squares.sqrt_()
