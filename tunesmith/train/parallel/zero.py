"""DeepSpeed's ZeRO: the optimizer's state, gradients and weights parted among the ranks, by stage."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import MachineError
from tunesmith.train.objectives.method import Batch, Loss
from tunesmith.train.parallel.alone import Alone, Step, Weights, of, parted_norms
from tunesmith.train.ranks import Ranks


class Parted(Alone):
    """Every rank holds a part of the optimizer's state (stage 1), of the gradients (2), of the weights (3)."""

    def __init__(self, ranks: Ranks, step: Step, weights: Weights, stage: int) -> None:
        super().__init__(ranks, step, weights)
        self.stage, self.whole_here = stage, stage < 3
        self.engine: Any = None
        self.deepspeed = _deepspeed()

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        if self.engine is not None:  # what was tried is forgotten; the engine is tied to its optimizer
            self.optimizer.optimizer.state.clear()  # type: ignore[attr-defined]
            return
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop says which pack is a step's last
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": sys.maxsize,
        }
        with contextlib.redirect_stdout(sys.stderr):
            engine, made, _, _ = self.deepspeed.initialize(
                model=self.step, optimizer=optimizer, config=config, dist_init_required=False
            )
        self.run, self.optimizer = engine, made
        self.engine = engine

    def __call__(self, batch: Batch, last: bool = False) -> Loss:
        self.engine.set_gradient_accumulation_boundary(last)
        return super().__call__(batch, last)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.ranks.world)  # DeepSpeed averages over ranks

    def clip(self, limit: float) -> float:
        zero: Any = self.optimizer
        groups = zero._get_norm_groups() if self.stage == 3 else [zero.scaled_global_norm()]
        norms = torch.stack([torch.as_tensor(norm).float() for norm in groups])
        self.optimizer.clip_grad = limit  # type: ignore[attr-defined]  # done by its step
        return float("inf") if (norms < 0).any() else torch.linalg.vector_norm(norms).item()  # below 0: not finite

    def update(self) -> None:
        self.engine.step()

    def forget(self) -> None:
        pass  # its step has done so

    def norms(self) -> Tensor:
        if self.stage < 3:
            return super().norms()
        return parted_norms([p.ds_tensor for p in self.weights.values()])  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def whole(self) -> Iterator[Any]:
        if self.stage < 3:
            yield self.model
            return
        with self.deepspeed.zero.GatheredParameters(list(self.model.parameters())):
            yield self.model

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        states = self.optimizer.optimizer.state  # type: ignore[attr-defined]
        held = {what: value for flat in self._flats() for what, value in states[flat].items()}
        found: dict[str, Tensor] = {}
        for name, parameter in self.weights.items():
            found[f"weight/{name}"] = safe_get_full_fp32_param(parameter).clone()
            for what, value in held.items():
                whole = value.ndim == 0  # a count of steps, the same for all
                full = value.clone() if whole else safe_get_full_optimizer_state(parameter, what).clone()
                found[f"optimizer/{what}/{name}"] = full
        numbers = [
            {k: v for k, v in group.items() if isinstance(v, bool | int | float)}
            for group in self.optimizer.param_groups
        ]
        return found, {"numbers": {}, "groups": numbers}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        states = self.optimizer.optimizer.state  # type: ignore[attr-defined]
        held = of(tensors, next(iter(self.weights)))
        for flat in self._flats():
            states[flat] = {
                what: value.clone() if value.ndim == 0 else torch.zeros_like(flat) for what, value in held.items()
            }
        self._link()
        for name, parameter in self.weights.items():
            weight = tensors[f"weight/{name}"].to(parameter.device)
            with self._one(parameter):
                parameter.data.copy_(weight)
            safe_set_full_fp32_param(parameter, weight)
            for what, value in of(tensors, name).items():
                if value.ndim:
                    safe_set_full_optimizer_state(parameter, value.to(parameter.device), what)

    def _one(self, parameter: nn.Parameter) -> Any:
        if self.stage < 3:
            return contextlib.nullcontext()
        return self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def _flats(self) -> list[nn.Parameter]:
        """This rank's part of the weights that are trained, as the optimizer holds it."""
        zero: Any = self.optimizer
        flats: list[nn.Parameter] = (
            zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        )
        return flats

    def _link(self) -> None:
        """Stages 1 and 2: say where in the flat state each weight's is. DeepSpeed does so after the first group's
        first step, when the other groups have no state yet."""
        if self.stage < 3:
            zero: Any = self.optimizer
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()


def _deepspeed() -> Any:
    """The library, without its notes.

    Raises:
        MachineError: it is not installed.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError as error:
        raise MachineError(
            "parallel zero needs DeepSpeed, which is not installed",
            where="train.parallel",
            fix="Install it: DS_BUILD_OPS=0 pip install 'tunesmith[zero]', or take parallel fsdp.",
        ) from error
    from deepspeed.utils.logging import set_log_level_from_string

    set_log_level_from_string("error")
    # Its reduction through shared memory is compiled at first use; gloo does without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed|deepspeed")
    return deepspeed
