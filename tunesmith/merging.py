"""`tunesmith merge`: what several runs or adapters learnt, as one adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, RunError
from tunesmith.kit import Kit, adapter_of
from tunesmith.recipe import load
from tunesmith.runs import get, read_json


def merge(
    out: Path, sources: Sequence[str], weights: Sequence[float], how: str, density: float, seed: int, runs: Path | None
) -> dict[str, Any]:
    """Merge the adapters of runs, or in folders, into the folder `out`.

    Raises:
        RunError: fewer than two sources, weights that do not count as many, or an `out` that is there.
        ModelError: an adapter of another base, or adapters that do not go together.
    """
    if len(sources) < 2 or len(weights) not in (0, len(sources)):
        raise RunError(
            f"{len(sources)} adapters and {len(weights)} weights",
            where="tunesmith merge",
            fix="Name two adapters or more, and a --weight for each or none.",
        )
    if not all(math.isfinite(weight) for weight in weights) or (weights and not any(weights)):
        raise RunError(
            f"{', '.join(map(str, weights))} are no weights",
            where="--weight",
            fix="Give numbers that are not all zero, such as 0.7 and 0.3.",
        )
    if not 0 < density <= 1:
        raise RunError(f"{density} keeps nothing", where="--density", fix="Give a share above 0, such as 0.5.")
    if out.exists():
        raise RunError("is there already", where=str(out), fix="Name a folder that is not there yet.")
    adapters = [adapter_of(name, Path.cwd(), runs) for name in sources]
    base = _base(adapters, runs)
    from tunesmith.models import merge as merging

    if how not in merging.WAYS:
        raise RunError(f"no way is called '{how}'", where="--how", fix=f"There are: {', '.join(merging.WAYS)}.")
    if len(set(sources)) < len(sources):
        raise RunError(
            "an adapter is named twice", where="tunesmith merge", fix="Name each once; --weight says its share."
        )
    shares = list(weights) or [1 / len(sources)] * len(sources)
    told = merging.merge(base, adapters, shares, how, density, seed, out)
    return {"adapter": str(out), "how": how, "of": dict(zip(sources, shares, strict=True)), **told}


def _base(adapters: Sequence[Path], runs: Path | None) -> Any:
    """The base of the first adapter: its run's, or the one that its folder names."""
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    for adapter in adapters:
        if adapter.parent.name == "train":
            run = get(str(adapter.parents[1]), runs)
            recipe, folder = load(run.recipe)
            return Kit(recipe, folder, run).model
        if (adapter / "base.json").is_file():
            return resolve(ModelSection(name=read_json(adapter / "base.json")["name"]))
    raise ModelError(
        "none of the adapters says which base it was made for",
        where=str(adapters[0]),
        fix="Give at least one as a run's name.",
    )
