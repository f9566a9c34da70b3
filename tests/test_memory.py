"""What a process really holds while it trains on a quantised base, against one that trains on the floats."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_model, write_recipe

ROOT = Path(__file__).parents[1]
LIBRARY = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "int4-torchao": "torchao"}
# Trains a recipe, and tells the most memory that was resident after the first step.
CHILD = """
import sys, threading, time
from pathlib import Path
import psutil, tunesmith

metrics, seen = Path(sys.argv[2]) / "tiny/metrics.jsonl", []

def look():
    while True:
        if metrics.exists() and metrics.stat().st_size:
            seen.append(psutil.Process().memory_info().rss)
        time.sleep(0.005)

threading.Thread(target=look, daemon=True).start()
tunesmith.run(sys.argv[1], (), sys.argv[2], ("data", "train"))
print(max(seen))
"""


# Frees 200 MiB that it has used, and a hundred times 512 KiB, and tells how many MiB of each stay with the process.
FREEING = """
import ctypes, sys, psutil
from tunesmith.models.machine import reuse_buffers

assert "torch" not in sys.modules
if sys.argv[1]:
    reuse_buffers(int(sys.argv[1]))
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def stays(size, times):
    before, found = psutil.Process().memory_info().rss, [libc.malloc(size) for _ in range(times)]
    for at in found:
        libc.memset(at, 1, size)
    for at in found:
        libc.free(at)
    return (psutil.Process().memory_info().rss - before) >> 20

print(stays(200 << 20, 1), stays(512 << 10, 100))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")
@pytest.mark.parametrize(
    ("below", "stays"), [("", (False, None)), (str(2**30), (True, None)), (str(2**20), (False, True))]
)
def test_freed_buffers_below_a_size_are_kept_for_the_next_and_larger_ones_given_back(
    below: str, stays: tuple[bool, bool | None]
) -> None:
    done = subprocess.run([sys.executable, "-c", FREEING, below], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    of_200, of_50 = map(int, done.stdout.split())
    assert (of_200 > 190) if stays[0] else (of_200 < 10)
    if stays[1]:
        assert of_50 > 40


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 million weights in the layers: 300 MB as float32."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 12}
    return make_model(tmp_path_factory.mktemp("large"), **sizes, num_key_value_heads=12, initializer_range=0.02)


def resident(recipe: dict[str, Any], folder: Path, quantise: str | None) -> int:
    """Bytes, in a process of its own."""
    folder.mkdir()
    recipe["train"] |= {"quantise": quantise, "max_steps": 4, "precision": "float32", "samples": 0}
    command = [sys.executable, "-c", CHILD, str(write_recipe(folder, recipe)), str(folder / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.splitlines()[-1])


@pytest.mark.long
def test_a_quantised_base_is_small_in_memory_while_it_is_trained_on(
    recipe: dict[str, Any], large: Path, tmp_path: Path
) -> None:
    recipe["model"] = str(large)
    weights = 8 * (4 * 768**2 + 3 * 768 * 3072)
    plain = resident(recipe, tmp_path / "plain", None)
    for quantise, library in LIBRARY.items():
        pytest.importorskip(library)
        from tunesmith.models.quantise import FORMATS

        saved = plain - resident(recipe, tmp_path / quantise, quantise)
        possible = weights * (4 - FORMATS[quantise].bits / 8)
        assert saved > 0.6 * possible, f"{quantise}: {saved / 2**20:.0f} of {possible / 2**20:.0f} MiB saved"
