"""What this machine and installation can do."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import psutil

from tunesmith.models.catalogue import EMBEDDED
from tunesmith.models.machine import machine
from tunesmith.models.resolve import cache_folder
from tunesmith.runs import runs_folder, versions

EXTRAS = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "test": "pytest", "lint": "ruff"}


def examine() -> dict[str, Any]:
    """Versions, processor, accelerators, memory, disk, the embedded models and the extras."""
    import torch

    there = machine()
    memory = psutil.virtual_memory()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in there.gflops.items())
    notes = []
    if there.tiles:
        notes.append("this machine hides the sizes of its AMX tiles; oneDNN is told them (train.precision: bfloat16)")
    elif there.isa:
        notes.append(f"oneDNN is held to {there.isa}: this machine names instructions that end the process")
    return {
        "versions": versions(),
        "processor": f"{there.cpu}, {there.cores} cores",
        "matrix products": f"{rates}; training uses {there.precision}",
        "accelerators": gpus,
        "memory": f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free",
        "disk for runs": _free(runs_folder()),
        "disk for models": _free(cache_folder()),
        "embedded models": [
            f"{name} ({'installed' if importlib.util.find_spec(m.package) else 'not installed'})"
            for name, m in EMBEDDED.items()
        ],
        "extras": {
            name: "installed" if importlib.util.find_spec(module) else "not installed"
            for name, module in EXTRAS.items()
        },
        "notes": notes,
    }


def _free(folder: Path) -> str:
    where = folder.resolve()
    while not where.exists():
        where = where.parent
    return f"{shutil.disk_usage(where).free / 2**30:.1f} GiB free in {folder}"
