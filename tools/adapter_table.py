"""Try what can be trained with what, and write it into docs/adapters.md.

Each cell is trained for two steps, stopped after the first, gone on with and compared bit for bit (tests/cells.py). The
first table has every adapter in every precision, with method sft; the second every method with every adapter, in
float32. `--all` tries every method with every adapter in every precision, and names the cells in which that differs
from what the two tables say. `--adapters lora,dora` tries only these and leaves the other rows as they stand.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs/adapters.md"
RESULTS = ROOT / "docs/adapters.json"
METHOD, PRECISION = "sft", "float32"
UNKNOWN = "not tried"


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
            told = known[f"{METHOD} | {adapter} | {precision}"] or known[f"{method} | {adapter} | {PRECISION}"]
            if bool(why) != bool(told):
                differ.append(f"{method}, {adapter}, {precision}: {why or 'works'}")
    write(known)
    if differ:
        sys.exit("Not as the tables say:\n" + "\n".join(differ))


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
