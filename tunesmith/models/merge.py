"""Several LoRA adapters of one base as one, through PEFT (TIES: Yadav et al. 2023, arXiv:2306.01708; DARE: Yu et al.
2023, arXiv:2311.03099)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tunesmith.errors import ModelError, first_line
from tunesmith.models.load import is_adapter, load_model, mark_base, refuse_anothers, refuse_spoilt
from tunesmith.models.resolve import ResolvedModel
from tunesmith.runs import whole_folder

WAYS = ("svd", "linear", "cat", "ties", "dare-linear", "dare-ties")
THINNED = ("ties", "dare-linear", "dare-ties")


def merge(
    base: ResolvedModel,
    adapters: Sequence[Path],
    weights: Sequence[float],
    how: str,
    density: float,
    seed: int,
    out: Path,
) -> dict[str, int]:
    """Write the weighted merger of `adapters` into the folder `out`, as an adapter for `base`.

    Args:
        how: svd is the weighted sum of the updates, at the largest of their ranks; cat the same without loss, at the
            sum of their ranks; linear sums A and B apart; ties and dare keep `density` of their entries.

    Returns:
        the merged adapter's rank and alpha.

    Raises:
        ModelError: one is of another base or no LoRA, or PEFT can't merge them in this way.
    """
    from peft import PeftModel

    for adapter in adapters:
        _refuse_unmergeable(base, adapter)
    model = load_model(base, torch.float32)
    names = [f"part{number}" for number in range(len(adapters))]
    torch.manual_seed(seed)
    try:
        tuned = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name=names[0])
        for name, adapter in zip(names[1:], adapters[1:], strict=True):
            tuned.load_adapter(str(adapter), adapter_name=name)
        tuned.add_weighted_adapter(
            names,
            list(weights),
            "merged",
            combination_type=how.replace("-", "_"),
            density=density if how in THINNED else None,
        )
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise ModelError(
            f"they can't be merged like this: {first_line(error)}",
            where=f"--how {how}",
            fix="svd and cat take adapters of different ranks; all must have the same targets for the others.",
        ) from error
    with whole_folder(out) as folder:
        tuned.save_pretrained(folder, selected_adapters=["merged"])
        for path in (folder / "merged").iterdir():
            path.rename(folder / path.name)
        (folder / "merged").rmdir()
        mark_base(folder, base)
    merged = tuned.peft_config["merged"]
    return {"rank": int(merged.r), "alpha": int(merged.lora_alpha)}


def _refuse_unmergeable(base: ResolvedModel, adapter: Path) -> None:
    """Raise a ModelError where an adapter is of another base, spoilt, or not LoRA's updates alone."""
    from peft import PeftConfig

    refuse_anothers(base, adapter)
    refuse_spoilt(adapter)
    if not (adapter / "adapter_config.json").is_file():
        held = "bottlenecks" if is_adapter(adapter) else "a whole model"
        raise ModelError(
            f"holds {held}, and only LoRA adapters can be merged with one another",
            where=str(adapter),
            fix="Name runs or folders of LoRA adapters.",
        )
    config = PeftConfig.from_pretrained(str(adapter))
    kind = config.peft_type
    if getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None):
        raise ModelError(
            "has a head of classes or new words besides its updates, and those can't be merged",
            where=str(adapter),
            fix="Merge adapters without them; package this run by itself.",
        )
    if kind != "LORA":
        raise ModelError(
            f"is a {kind} adapter, and only LoRA's can be merged with one another",
            where=str(adapter),
            fix="Merge it into its base instead: package the run.",
        )
