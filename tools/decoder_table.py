"""Try every type of causal language model that transformers has, and write into docs/speed.md what they came to.

Each is made tiny from its configuration's class, and the losses and gradients of rows are held against the model's own
(tests/decoders.py). What each came to, and why, goes into docs/decoders.json. Types named as arguments are tried alone.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs/speed.md"
RESULTS = ROOT / "docs/decoders.json"


def main() -> None:
    from tests import decoders
    from tunesmith.models.load import silence
    from tunesmith.models.machine import machine
    from tunesmith.progress import quiet

    quiet()
    machine()
    silence()
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["types"] if RESULTS.exists() else {}
    for kind in sys.argv[1:] or decoders.every():
        known[kind] = decoders.tried(kind)
        print(f"{kind:28} {': '.join(known[kind])}", flush=True)
    libraries = {name: version(name) for name in ("transformers", "torch")}
    found = libraries | {"types": {kind: known[kind] for kind in decoders.every() if kind in known}}
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


def written(page: str, found: dict[str, Any]) -> str:
    """The page with the table of what types came to."""
    from tests import decoders

    told = {
        decoders.PACKED: "packed: rows in one forward",
        decoders.APART: "one row at a time, the general way",
        decoders.REFUSED: "refused, with the reason",
        decoders.UNMADE: "not tried: could not be made tiny",
    }
    lines = [f"| of {len(found['types'])} types | how many | which |", "| --- | --: | --- |"]
    for way, what in told.items():
        names = [kind for kind, (came_to, _) in found["types"].items() if came_to == way]
        lines.append(f"| {what} | {len(names)} | {', '.join(names)} |")
    made_with = f"transformers {found['transformers']}, torch {found['torch']}:"
    between = re.compile(r"(<!-- decoders -->\n).*?(<!-- end of decoders -->)", re.DOTALL)
    table = "\n".join(lines)
    return between.sub(lambda m: f"{m[1]}\n{made_with}\n\n{table}\n\n{m[2]}", page)


if __name__ == "__main__":
    main()
