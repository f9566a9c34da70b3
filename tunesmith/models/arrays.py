"""Safetensors folders as numpy arrays, without torch: what writes other formats needs no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.errors import ModelError

KINDS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def arrays(folder: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """Each weight's name and its values in float32, one at a time.

    Raises:
        ModelError: a file that is cut short, or holds something else than floating-point numbers.
    """
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(size))
            except ValueError as error:
                raise ModelError(f"is damaged ({error})", where=str(path), fix="Fetch the model again.") from error
        data = np.memmap(path, np.uint8, "r", offset=8 + size)
        for name, about in header.items():
            if name == "__metadata__":
                continue
            if about["dtype"] not in KINDS:
                raise ModelError(
                    f"holds {name} as {about['dtype']}", where=str(path), fix="Take weights in 16 or 32 bits."
                )
            first, last = about["data_offsets"]
            found = data[first:last].view(KINDS[about["dtype"]]).reshape(about["shape"])
            if about["dtype"] == "BF16":  # the upper half of a float32
                found = (found.astype(np.uint32) << 16).view(np.float32)
            yield name, np.asarray(found, np.float32)
