"""What can be trained with what: some cells of the tables in docs/adapters.md each time, all of them in long tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import cells
from tools import adapter_table
from tunesmith import plugins

KNOWN: dict[str, str] = json.loads(adapter_table.RESULTS.read_text(encoding="utf-8"))
CELLS = [tuple(cell.split(" | ")) for cell in KNOWN]
# One adapter of each make over a quantised base; every method with plain weights, and with what lies before a row.
SOME = {("sft", adapter, "nf4") for adapter in ("lora", "dora", "vera", "prompt", "bottleneck, parallel")}
SOME |= {(method, adapter, "float32") for method in cells.methods() for adapter in ("lora", "prefix")}
SOME |= {cell for cell, why in zip(CELLS, KNOWN.values(), strict=True) if " with quantise " in why}


def test_the_tables_have_every_adapter_method_and_precision() -> None:
    assert {a["kind"] for a in cells.ADAPTERS.values()} == set(plugins.BUILT_IN["adapter"])
    expected = {c for c in cells.cells() if c[0] == adapter_table.METHOD or c[2] == adapter_table.PRECISION}
    assert set(CELLS) <= expected, "run: python tools/adapter_table.py"
    assert {c[0] for c in CELLS} == set(cells.methods()) and {c[1] for c in CELLS} == set(cells.ADAPTERS)
    assert {c[2] for c in CELLS} == set(cells.PRECISIONS)
    page = adapter_table.PAGE.read_text(encoding="utf-8")
    assert adapter_table.written(page, KNOWN) == page, "run: python tools/adapter_table.py"
    assert adapter_table.counted(KNOWN) in page, "run: python tools/adapter_table.py --all"


@pytest.mark.parametrize(
    "cell", [pytest.param(c, marks=[] if c in SOME else pytest.mark.long) for c in CELLS], ids=" | ".join
)
def test_a_cell_is_as_the_table_says(cell: tuple[str, str, str], tiny_model: Path, tmp_path: Path) -> None:
    from tunesmith.models.quantise import FORMATS

    library = FORMATS[cell[2]].library if cell[2] in FORMATS else "torch"
    why = KNOWN[" | ".join(cell)]
    if not why:
        pytest.importorskip(library)
    assert cells.tried(*cell, tiny_model, tmp_path) == why


@pytest.mark.long
def test_every_method_does_with_every_adapter_in_every_precision_what_the_two_tables_say() -> None:
    done = subprocess.run(
        [sys.executable, adapter_table.__file__, "--all"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
