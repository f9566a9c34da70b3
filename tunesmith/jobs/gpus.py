"""NVIDIA devices of a machine, without loading torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

NAMED = "CUDA_VISIBLE_DEVICES"


def devices() -> list[str]:
    """What this process may use, as CUDA names it."""
    if NAMED in os.environ:
        return [name for name in os.environ[NAMED].split(",") if name]
    return [str(place) for place in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def visible(needs: dict[str, Any]) -> dict[str, str]:
    """The environment that shows a job its own devices alone. One that is planned first sees them all."""
    if needs.get("asked_gpus", 1) == 0:
        return {NAMED: ""}
    given = devices()
    return {NAMED: ",".join(given[place] for place in needs["devices"])} if needs.get("devices") else {}
