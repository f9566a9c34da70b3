"""What this machine can do: cores, memory, accelerators, and which precision is fast and safe on it.

The last can't be read off a list: processors that name bfloat16 instructions run it from eight times as
fast as float32 to half as fast, and virtual machines announce AMX tiles that then kill the process. So a
child process tries, once a machine, and the answer is kept. `tiles.py` has what can be done about the tiles.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import psutil

from tunesmith.models.resolve import cache_folder
from tunesmith.models.tiles import tell
from tunesmith.progress import clock
from tunesmith.runs import hash_json, versions, write_json

BFLOAT16_MUST_GAIN = 1.3
HERE = Path(__file__).parents[2]
ISA = "ONEDNN_MAX_CPU_ISA"
OUR_ISA = "TUNESMITH_MAX_CPU_ISA"  # what this or a parent process set ISA to, for processes that it starts
NO_TILES = "AVX512_CORE_BF16"
TELL = "import sys; from tunesmith.models.tiles import tell; tell() or sys.exit(1)"
PROBE = """
import json, time, torch
def rate(dtype):
    a, b = torch.randn(1024, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
    best = float("inf")
    for turn in range(80):
        if turn % 20 == 19:
            time.sleep(0.4)  # a neighbour's busy moment should not be the machine's figure
        start = time.perf_counter(); torch.nn.functional.linear(a, b); best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 1024 * 2048 / best / 1e9
cuda = torch.cuda.is_available()
print(json.dumps({"float32": rate(torch.float32), "bfloat16": rate(torch.bfloat16),
                  "cuda": cuda, "cuda_bfloat16": cuda and torch.cuda.is_bf16_supported()}))
"""


@dataclass(frozen=True)
class Machine:
    """Measured once and remembered.

    Attributes:
        precision: "bfloat16" or "float32", the one that `auto` stands for.
        gflops: measured GFLOP/s of a matrix product, by precision.
        isa: a limit on oneDNN's instructions that must be set before torch starts, or None.
        tiles: whether oneDNN must be told AMX's tiles instead, once torch is there. Other programs then need `isa`.
    """

    cpu: str
    cores: int
    device: str
    precision: str
    gflops: dict[str, float]
    isa: str | None
    tiles: bool = False

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"memory_gib": round(psutil.virtual_memory().total / 2**30, 1)}


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _flags() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@cache
def machine() -> Machine:
    """This machine, probed at first use (about five seconds) and read from the cache after that.

    Sets the limit on oneDNN's instructions for this process where one is needed (or tells it AMX's tiles, which loads
    torch), how long OpenMP's threads spin, and how CUDA's memory grows, so it must be called before torch is imported.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Threads that wait by spinning take the cores from whoever else is there, and are then late themselves.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if os.environ.get(ISA) == os.environ.get(OUR_ISA):  # a parent's, for programs that don't look
        os.environ.pop(ISA, None)
    seen = [os.environ.get(name) for name in (ISA, "CUDA_VISIBLE_DEVICES")]
    mark = hash_json(["few shapes", cpu_name(), _flags(), cores, versions().get("torch"), seen])[:16]
    file = cache_folder() / f"machine-{mark}.json"
    try:
        found = Machine(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        found = _probe(cores)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(found))
    if found.device == "cuda" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        # Segments that grow waste less between rows of different lengths.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if found.tiles and not tell():  # the compiler's work is gone, say
        found = replace(found, tiles=False, precision="float32")
    if found.isa and ISA not in os.environ:  # with tiles: for the processes to come, this one's oneDNN has read it
        os.environ[ISA] = os.environ[OUR_ISA] = found.isa
    if found.device == "cpu":  # DeepSpeed, where it is installed, else looks for a device and says so
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return found


def _probe(cores: int) -> Machine:
    found: dict[str, float] | None = None
    isa, tiles = None, False
    with clock("Measuring this machine", 10):
        for limit, told in ((None, False), (None, True), (NO_TILES, False), ("AVX512_CORE", False), ("AVX2", False)):
            found = _try(limit, told)
            if found:
                isa, tiles = (NO_TILES, True) if told else (limit, False)
                break
    found = found or {"float32": 0.0, "bfloat16": 0.0}
    cuda = bool(found.pop("cuda", False))
    gains = found["bfloat16"] > BFLOAT16_MUST_GAIN * found["float32"]
    cuda_is_fast = bool(found.pop("cuda_bfloat16", False))
    fast = cuda_is_fast if cuda else gains
    rates = {name: round(rate, 1) for name, rate in found.items()}
    return Machine(cpu_name(), cores, "cuda" if cuda else "cpu", "bfloat16" if fast else "float32", rates, isa, tiles)


def _try(limit: str | None, tiles: bool) -> dict[str, float] | None:
    """What a child process measured, or None where it died (of an instruction that this machine does not have)."""
    if tiles and "amx_tile" not in _flags():
        return None
    environment = dict(os.environ) | ({ISA: limit} if limit else {})
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", (TELL if tiles else "") + PROBE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    try:
        rates: dict[str, float] = json.loads(done.stdout)
    except ValueError:
        return None
    return rates


def give_back() -> None:
    """Return what glibc keeps of freed memory (see `reuse_buffers`), so that a stage does not carry another's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def give_back_above(most: float) -> None:
    """`give_back`, where this process has more than `most` bytes. Buffers of ever new sizes leave holes that the next
    do not fit into, so what is kept grows step by step; pages that come anew cost a little time."""
    if psutil.Process().memory_info().rss > most:
        give_back()


def peak_memory(device: str) -> int:
    """Most bytes in use since `forget_peak`: of the accelerator's memory, else of this process."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    peak = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
    return peak or int(psutil.Process().memory_info().rss)


def forget_peak(device: str) -> None:
    """Begin anew for `peak_memory`, where the system can."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def reuse_buffers(below: int = 2**30) -> None:
    """Have glibc keep freed memory for the next buffer of less than `below` bytes, instead of giving it back and
    faulting it in again. Larger ones are given back at once, and leave no holes that others fill by and by.

    What MALLOC_MMAP_THRESHOLD_ and its like do from outside, done from inside; nothing on other systems.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        _ = mallopt(mmap_threshold, below) or mallopt(mmap_threshold, 2**25)  # the most that glibc before 2.35 takes
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 2**26)
