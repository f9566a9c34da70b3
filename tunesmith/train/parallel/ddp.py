"""Torch's DistributedDataParallel: whole models side by side."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tunesmith.train.objectives.method import Batch, Loss
from tunesmith.train.parallel.alone import Alone, Step, Weights
from tunesmith.train.ranks import Ranks


class Replicated(Alone):
    """Every rank holds the whole model and takes the same step."""

    def __init__(self, ranks: Ranks, step: Step, weights: Weights, bucket_mb: int) -> None:
        super().__init__(ranks, step, weights)
        # Unused parameters are looked for: an expert that no token reached must not hold up the step; and buckets
        # then keep their order, so that a run that goes on adds in the order of one that was never stopped.
        self.run: Any = DistributedDataParallel(
            step, bucket_cap_mb=bucket_mb, forward_sync_buffers=False, find_unused_parameters=True
        )
        self.run.register_comm_hook(None, lambda _, bucket: _added(bucket))

    def __call__(self, batch: Batch, last: bool = False) -> Loss:
        self.run.require_backward_grad_sync = last
        return super().__call__(batch, last)


def _added(bucket: Any) -> Any:
    """The sum of the ranks' gradients; DDP would average, but a loss is divided by the whole step's size already."""
    sent = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return sent.then(lambda done: done.value()[0])
