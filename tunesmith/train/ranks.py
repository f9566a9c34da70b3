"""The processes that train one model together: who is who, and the few numbers that they tell one another.

torchrun starts them and says who is who in the environment; gloo carries the numbers, NCCL the tensors of CUDA
devices. One process alone is a rank of one, and exchanges nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tunesmith.errors import RankLost, first_line

PATIENCE = timedelta(days=7)  # the others wait while the first one prepares data, evaluates or writes


@dataclass
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: its number, from 0; the first one alone writes and speaks.
        world: how many there are.
        local, local_world: the same on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    _told: bool = False

    @classmethod
    def of_environment(cls) -> Ranks:
        """As torchrun says in RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""

        def number(name: str, default: int) -> int:
            return int(os.environ.get(name) or default)

        return cls(number("RANK", 0), number("WORLD_SIZE", 1), number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", 1))

    @property
    def main(self) -> bool:
        return self.rank == 0

    def join(self, device: str, cores: int) -> str:
        """Meet the others; returns this rank's device. Cores are shared out among the ranks of a machine.

        torchrun sets OMP_NUM_THREADS to 1 where nobody has; any other number is somebody's choice.
        """
        if self.world == 1:
            return device
        import torch
        import torch.distributed as dist

        if os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, cores // self.local_world))
        if device == "cuda":
            torch.cuda.set_device(self.local)
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
        return f"cuda:{self.local}" if device == "cuda" else device

    def leave(self, cores: int) -> None:
        """Part from the others; whoever stays has the machine's cores again. (gloo is kept for a next run: it costs
        nothing, and meeting anew is not reliable. NCCL holds memory of the device.)"""
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist

        if dist.is_initialized() and torch.cuda.is_available():
            dist.destroy_process_group()
        torch.set_num_threads(max(torch.get_num_threads(), cores))

    def gather(self, value: float) -> list[float]:
        """A number of each rank."""
        if self.world == 1:
            return [value]
        import torch
        import torch.distributed as dist

        found = [torch.zeros(1, dtype=torch.float64) for _ in range(self.world)]
        dist.all_gather(found, torch.tensor([value], dtype=torch.float64))
        return [number.item() for number in found]

    def all(self, value: Any) -> list[Any]:
        """Something of each rank, of any kind."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def sum(self, value: float) -> float:
        return value if self.world == 1 else math.fsum(self.gather(value))

    def any(self, value: bool) -> bool:
        return any(self.gather(float(value)))

    def from_main(self, made: Callable[[], Any]) -> Any:
        """What the first rank makes, on every rank."""
        if self.world == 1:
            return made()
        import torch.distributed as dist

        box = [made() if self.main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Within this, the first rank goes first: what it keeps on disk, the others find there."""
        if not self.main:
            self.meet()
        yield
        if self.main:
            self.meet()

    def same(self, tensors: Iterable[Any]) -> None:
        """Make tensors the first rank's, in place."""
        if self.world > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.gather(0.0)

    def call(self, word: str) -> None:
        """Tell the ranks that wait in `called` what comes now (once; later words are not said)."""
        if self.world > 1 and self.main and not self._told:
            self._told = True
            self.from_main(lambda: word)

    def called(self) -> Any:
        """Wait for the first rank's word."""
        return self.from_main(lambda: None)

    def share(self, rows: Sequence[int], length: Callable[[int], int]) -> list[list[int]]:
        """A step's rows for each rank: the longest first, to whoever has the fewest tokens.

        It follows from the rows alone, so every rank knows what the others have.
        """
        if self.world == 1:
            return [list(rows)]
        parts: list[set[int]] = [set() for _ in range(self.world)]
        loads = [0] * self.world
        for place in sorted(range(len(rows)), key=lambda p: (-length(rows[p]), p)):
            lightest = loads.index(min(loads))
            parts[lightest].add(place)
            loads[lightest] += length(rows[place])
        return [[rows[place] for place in sorted(part)] for part in parts]

    def lost(self, error: BaseException) -> RankLost | None:
        """The error to show where one of torch's says that another rank is no longer there."""
        if self.world == 1:
            return None
        import torch.distributed as dist

        told = first_line(error)
        if isinstance(error, dist.DistError) or "gloo" in told or "NCCL" in told:
            return RankLost(
                f"rank {self.rank} of {self.world} lost touch with another rank ({told})",
                fix="Look for what ended the other one. The same command goes on from the last checkpoint.",
            )
        return None
