"""What only one process can do yet, refused before anything is loaded."""

from __future__ import annotations

from tunesmith.errors import RecipeError
from tunesmith.train.adapters.adapter import Adapter
from tunesmith.train.section import TrainSection

# Of optimizers that treat every number of a weight alike: a part of a weight is enough for them.
ELEMENTWISE = ("adamw", "sgd", "lion")


def several(section: TrainSection) -> None:
    """Raise where several ranks can't do what the recipe asks for.

    Raises:
        RecipeError: names the key, and what to take.
    """
    kind = section.parallel.kind
    if kind != "ddp" and section.optimizer.kind not in ELEMENTWISE:
        raise RecipeError(
            f"{section.optimizer.kind} looks at a weight as a whole, and {kind} parts it among the ranks",
            where="train.parallel",
            fix=f"Take parallel ddp, or one of the optimizers {', '.join(ELEMENTWISE)}.",
        )
    if section.keep and kind != "ddp":
        raise RecipeError(
            f"its terms look at whole weights, and {kind} parts them among the ranks",
            where="train.keep",
            fix="Take train.parallel: ddp, or leave train.keep away.",
        )
    if getattr(section.adapter, "unfreeze_every", None) or getattr(section.adapter, "lisa", None):
        raise RecipeError(
            "layers that are trained in turns are one process's",
            where="train.adapter",
            fix="Leave --nproc (torchrun) away, or train the same layers throughout.",
        )
    if kind != "ddp" and type(section.adapter).after_step is not Adapter.after_step:
        raise RecipeError(
            f"{section.adapter.kind} looks at whole gradients, and {kind} parts them among the ranks",
            where="train.parallel",
            fix="Take parallel ddp, or another adapter.",
        )
    if section.quantise and not section.parallel.whole_here:
        raise RecipeError(
            "weights in 4 or 8 bits can't be parted among the ranks",
            where="train.quantise",
            fix="Take train.parallel: ddp, or leave train.quantise away.",
        )
    if section.figure is None and not section.parallel.whole_here:
        raise RecipeError(
            f"is {section.best_by}, and no rank has the whole model to answer with",
            where="train.best_by",
            fix="Take train.best_by: loss, or train.parallel: ddp.",
        )
