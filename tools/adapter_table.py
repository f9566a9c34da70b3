"""Try what can be trained with what, and write it into docs/adapters.md.

Each cell is trained for two steps, stopped after the first, gone on with and compared bit for bit (tests/cells.py). The
first table has every adapter in every precision, with method sft; the second every method with every adapter, in
float32. `--all` tries every method with every adapter in every precision, names the cells in which that differs from
what the two tables say (`said`), and writes onto the page when all were tried and none differed. `--adapters lora,dora`
tries only these and leaves the other rows as they stand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs/adapters.md"
RESULTS = ROOT / "docs/adapters.json"
METHOD, PRECISION = "sft", "float32"
UNKNOWN = "not tried"
TRIED = re.compile(r"(<!-- all -->\n).*?(<!-- end of all -->)", re.DOTALL)
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "torchao")


def main() -> None:
    from tests import cells
    from tests.conftest import make_model
    from tunesmith.models.machine import machine
    from tunesmith.progress import quiet

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--adapters", default=",".join(cells.ADAPTERS).replace(", ", "/"))
    chosen = parser.parse_args()
    quiet()
    machine()
    known: dict[str, str] = {}
    wanted = {name.replace("/", ", ") for name in chosen.adapters.split(",")}
    differ = []
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "tiny")
        for method, adapter, precision in cells.cells():
            if adapter not in wanted or not (chosen.all or method == METHOD or precision == PRECISION):
                continue
            why = cells.tried(method, adapter, precision, model, Path(folder))
            told = why or "trained, stopped, went on to the same bytes"
            print(f"{method:8} {adapter:22} {precision:14} {told}", flush=True)
            if method == METHOD or precision == PRECISION:
                known[f"{method} | {adapter} | {precision}"] = why
                continue
            if why not in said(known, method, adapter, precision):
                differ.append(f"{method}, {adapter}, {precision}: {why or 'works'}")
    write(known)
    if differ:
        sys.exit("Not as the tables say:\n" + "\n".join(differ))
    if chosen.all and wanted == set(cells.ADAPTERS):
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(TRIED.sub(lambda m: f"{m[1]}\n{counted(known)}\n{when()}\n\n{m[2]}", page), encoding="utf-8")


def said(known: Mapping[str, str], method: str, adapter: str, precision: str) -> set[str]:
    """What the two tables say of a cell: for which reasons it is refused, or that it works ("").

    It does what sft does in that precision, but for what the second table refuses the method for and not sft.
    """
    table = {known[f"{METHOD} | {adapter} | {precision}"]}
    own = known[f"{method} | {adapter} | {PRECISION}"]
    if own != known[f"{METHOD} | {adapter} | {PRECISION}"]:
        table.add(own)
    return table if table == {""} else table - {""}


def counted(known: Mapping[str, str]) -> str:
    """How many cells there are of every method, adapter and precision, and how many of them work."""
    from tests import cells

    told = [said(known, *cell) for cell in cells.cells()]
    working = told.count({""})
    return f"{len(told):,} cells: {working:,} work, {len(told) - working:,} are refused."


def when() -> str:
    """The day, and what was installed."""
    from importlib.metadata import version

    day = datetime.now(UTC).date().isoformat()
    return f"All of them were tried on {day}, with {', '.join(f'{name} {version(name)}' for name in LIBRARIES)}."


def write(found: dict[str, str]) -> None:
    """Put what was found, in the place of what was known of the same cells, into the results and the page."""
    from tests import cells

    known = (json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}) | found
    here = [f"{m} | {a} | {p}" for m, a, p in cells.cells() if m == METHOD or p == PRECISION]
    known = {cell: known[cell] for cell in here if cell in known}
    RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), known), encoding="utf-8")


def written(page: str, known: dict[str, str]) -> str:
    """The page with both tables as the results say."""
    from tests import cells

    notes: list[str] = []

    def table(heads: list[str], cell: str) -> str:
        lines = [f"| | {' | '.join(heads)} |", f"| --- |{' :-: |' * len(heads)}"]
        for adapter in cells.ADAPTERS:
            marks = [mark(known.get(cell.format(adapter=adapter, head=head), UNKNOWN)) for head in heads]
            lines.append(f"| `{adapter}` | {' | '.join(marks)} |")
        return "\n".join(lines)

    def mark(why: str) -> str:
        if why == UNKNOWN:
            return "?"
        if not why:
            return "yes"
        why = re.sub(r"^adapter \S+ with quantise \S+: ", "", why)
        if why not in notes:
            notes.append(why)
        return f"no [{notes.index(why) + 1}]"

    one = table(list(cells.PRECISIONS), f"{METHOD} | {{adapter}} | {{head}}")
    two = table(cells.methods(), f"{{head}} | {{adapter}} | {PRECISION}")
    told = "\n".join(f"{number}. {why}" for number, why in enumerate(notes, 1))
    parts = f"{one}\n\nEvery method, in float32:\n\n{two}\n\n{told}\n"
    between = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)
    return between.sub(lambda m: f"{m[1]}\n{parts}\n{m[2]}", page)


if __name__ == "__main__":
    main()
