"""AMX on virtual machines that announce it and hide the sizes of its tiles.

oneDNN reads those sizes with the CPUID instruction and, where a hypervisor answers with nothing, configures no tiles:
the first instruction that uses one then ends the process. The processor itself works, and multiplies bfloat16 matrices
several times as fast as float32 ones. So oneDNN's one question is answered for it, by a few lines of C that are
compiled at first use; without a compiler everything stays as it would be.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from tunesmith.models.resolve import cache_folder
from tunesmith.runs import hash_file

SOURCE = Path(__file__).with_name("tiles.c")
COMPILERS = ("cc", "gcc", "clang")
# Products whose kernels ask for all there is to know: whole tiles, odd sizes, one row.
ASKING = ((64, 64, 64), (37, 53, 41), (1, 64, 33))


@cache
def tell() -> bool:
    """Have oneDNN told the tiles, if they are hidden and can be told; before this process's first bfloat16 product.

    Loads torch. Threads are held to one meanwhile: those that start inherit the trap.
    """
    library = _library()
    if library is None:
        return False
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if library.trap():
            return False
        try:
            for rows, width, columns in ASKING:
                x, weight = (
                    torch.ones(rows, width, dtype=torch.bfloat16),
                    torch.ones(columns, width, dtype=torch.bfloat16),
                )
                torch.nn.functional.linear(x, weight)
        finally:
            told = library.untrap()
    finally:
        torch.set_num_threads(threads)
    return bool(told)


def _library() -> ctypes.CDLL | None:
    file = compiled()
    try:
        return ctypes.CDLL(str(file)) if file else None
    except OSError:
        return None


def compiled() -> Path | None:
    """The compiled C, in the cache; None where it can't be had."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    file = cache_folder() / f"tiles-{hash_file(SOURCE)[:16]}.so"
    if not file.exists():
        compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
        if compiler is None:
            return None
        file.parent.mkdir(parents=True, exist_ok=True)
        made = file.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(made), str(SOURCE)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        made.replace(file)
    return file
