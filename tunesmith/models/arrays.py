"""What lies in adapters' and models' folders, without torch: safetensors as numpy arrays, an adapter's settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import ModelError

ADAPTER = "adapter_config.json"
KINDS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def adapter_config(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of itself.

    Raises:
        ModelError: it holds no adapter, or says nothing that can be read.
    """
    try:
        found = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError("holds no adapter", where=str(folder), fix=f"Give the folder that holds {ADAPTER}.") from None
    except (OSError, ValueError) as error:
        raise _damaged(folder / ADAPTER, str(error)) from error
    if not isinstance(found, dict):
        raise _damaged(folder / ADAPTER, "it is no mapping")
    return found


def is_plain_lora(folder: Path) -> bool:
    """Whether a folder holds an adapter of LoRA's two matrices and nothing else: what engines load beside others.

    Raises:
        ModelError: it is damaged.
    """
    about = adapter_config(folder) if (folder / ADAPTER).is_file() else {}
    if about.get("peft_type") != "LORA" or about.get("use_dora"):
        return False
    names = (name for path in folder.glob("*.safetensors") for name in _header(path)[0] if name != "__metadata__")
    return all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)


def scale_of(about: dict[str, Any], module: str, rank: int) -> float:
    """What B·A is multiplied by: alpha / rank, or alpha / sqrt(rank) (rank-stabilised: Kalajdzievski 2023).

    Raises:
        ModelError: the adapter's alpha is no number.
    """
    try:
        alpha = float(about["lora_alpha"])
        for pattern, own in (about.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # as PEFT does it: the first one that fits
                alpha = float(own)
                break
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise ModelError(
            f"its adapter_config.json has no usable lora_alpha or alpha_pattern ({error})",
            where=module,
            fix="Copy or fetch it again.",
        ) from error
    return alpha / (rank**0.5 if about.get("use_rslora") else rank)


def arrays(folder: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Each weight's name and its values in float32, one at a time.

    Raises:
        ModelError: a file that is cut short, or holds something else than finite floating-point numbers.
    """
    for path in sorted(folder.glob("*.safetensors")):
        header, start = _header(path)
        data = np.memmap(path, np.uint8, "r", offset=start) if path.stat().st_size > start else np.empty(0, np.uint8)
        for name, about in header.items():
            if name == "__metadata__":
                continue
            try:
                kind, (first, last), shape = about["dtype"], about["data_offsets"], about["shape"]
                found = data[first:last].view(KINDS[kind]).reshape(shape) if kind in KINDS else None
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(path, f"{name[:80]}: {error}") from error
            if found is None:
                raise ModelError(f"holds {name} as {kind}", where=str(path), fix="Take weights in 16 or 32 bits.")
            if kind == "BF16":  # the upper half of a float32
                found = (found.astype(np.uint32) << 16).view(np.float32)
            if not np.isfinite(found).all():
                raise ModelError(
                    f"has weights that are not finite, such as {name}",
                    where=str(path),
                    fix="Take one that was saved before it broke.",
                )
            yield name, np.asarray(found, np.float32)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file says of its weights, and where they begin."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= path.stat().st_size - 8:  # the first eight bytes may be anything
            raise _damaged(path, "it ends too early")
        try:
            header = json.loads(file.read(size))
        except ValueError as error:
            raise _damaged(path, str(error)) from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is no mapping")
    return header, 8 + size


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path.name} is damaged ({why})", where=str(path), fix="Copy or fetch it again.")
