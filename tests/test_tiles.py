"""bfloat16 products on the machine at hand, whatever it hides; each in a process of its own, as it may die of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith.models import tiles
from tunesmith.models.machine import machine

PRODUCTS = """
import torch
torch.manual_seed(0)
for m, k, n in [(1, 64, 33), (37, 53, 41), (994, 576, 1536), (626, 1536, 576), (5, 700, 1)]:
    x, w = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    exact = x.float() @ w.float().T
    assert ((x @ w.T).float() - exact).abs().max() <= exact.abs().max() / 128, (m, k, n)
q = torch.randn(2, 3, 70, 64).bfloat16()
torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=dict(os.environ) | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_products_are_right_once_the_machine_is_known() -> None:
    done = run("from tunesmith.models.machine import machine; machine()\n" + PRODUCTS)
    assert done.returncode == 0, done.stderr


def test_programs_that_do_not_look_are_safe_too() -> None:
    machine()
    done = run(PRODUCTS)
    assert done.returncode == 0, done.stderr


def test_without_a_compiler_the_machine_does_without_tiles(tmp_path: Path) -> None:
    if not machine().tiles:
        pytest.skip("this machine hides no tiles")
    done = run(
        "from tunesmith.models.machine import machine; print(machine().tiles, machine().isa)\n" + PRODUCTS,
        PATH="",
        TUNESMITH_CACHE=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "False"


def test_a_fault_of_its_own_still_ends_a_process() -> None:
    library = tiles.compiled()
    if library is None:
        pytest.skip("no C compiler, or another system")
    done = run(f"import ctypes\nl = ctypes.CDLL({str(library)!r})\nprint(l.trap(), flush=True)\nctypes.string_at(0)")
    if done.stdout.strip() != "0":
        pytest.skip("this system has no fault for CPUID")
    assert done.returncode == -signal.SIGSEGV
