"""Environments of the tools that we are measured beside: installed at first use, given what Tunesmith gives itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if os.environ.get("GOMP_CPU_AFFINITY") or os.environ.get("OMP_PROC_BIND"):
    sys.exit("Unset GOMP_CPU_AFFINITY and OMP_PROC_BIND: what a bound process starts would stay on its one core.")
HERE = Path(__file__).parent
TORCH = "torch==2.13.0"
# What torch's installation may bring: it wants CUDA's libraries, and stops transformers.
ABSENT = ("torchvision", "torchaudio")
# glibc keeps big buffers instead of giving them back after each step; Tunesmith sets the same for itself.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}


def python_of(name: str, pins: Sequence[str]) -> Path:
    """The Python of an environment (benchmarks/.peers/NAME), made at first use."""
    folder = HERE / ".peers" / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print("Installing", *pins, "into", folder, file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH, *pins], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *ABSENT], check=True)
        (folder / "ready").touch()
    return python


def own_environment() -> dict[str, str]:
    """The environment variables that our side runs with; what lies here can be imported."""
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ) | ALLOCATOR | {"PYTHONPATH": paths}


def peers_environment(untold: bool = False) -> dict[str, str]:
    """The same for peers, who get our guard against instructions that a machine only claims to have, and its AMX tiles
    where it hides them (unless `untold`)."""
    from tunesmith.models.machine import ISA, machine
    from tunesmith.models.tiles import compiled

    here = machine()
    environment = dict(os.environ) | ALLOCATOR | ({ISA: here.isa} if here.isa else {})
    if here.tiles and not untold:
        environment |= {"TILES": str(compiled())}
        environment.pop(ISA, None)
    return environment


def run(command: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    """A script's figures: the JSON object in the last line that it prints."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[:2]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures
