"""Recall and precision of `data.clean.personal`, per kind, on presidio's synthetic sentences.

    python benchmarks/privacy.py FOLDER/presidio_synth_dataset_v2.json [--names auto|none|MODEL] [--missed]

A true span counts as found where findings cover at least half of its characters, whatever they call it ("found"), or
call it by its own kind ("by name"). Precision: the share of findings of a kind of which at least half lies in true
spans of that kind. The corpus is github.com/microsoft/presidio-research, data/synth_dataset_v2.json (MIT).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from tunesmith.data.clean.personal import Personal

# The corpus's names of kinds -> ours.
KINDS = {
    "GPE": "LOCATION",
    "DOMAIN_NAME": "URL",
}
PATTERN_KINDS = ("CREDIT_CARD", "EMAIL_ADDRESS", "IBAN_CODE", "IP_ADDRESS", "PHONE_NUMBER", "URL", "US_SSN")


def measured(rows: list[dict], names: str) -> tuple[dict[str, dict[str, float]], list[str]]:
    """For each kind: n, found, by name, precision, findings; and the true spans that were missed."""
    step = Personal(kinds=("all",), names=names)
    true, covered, named, findings, right = Counter(), Counter(), Counter(), Counter(), Counter()
    missed = []
    for row in rows:
        text = row["full_text"]
        found = step.finder.find(text, step.threshold)
        spans = [
            (KINDS.get(s["entity_type"], s["entity_type"]), s["start_position"], s["end_position"])
            for s in row["spans"]
        ]
        for kind, start, end in spans:
            true[kind] += 1
            shared = {f: max(min(end, f.end) - max(start, f.start), 0) for f in found}
            half = (end - start) / 2
            if sum(shared.values()) >= half:
                covered[kind] += 1
            else:
                missed.append(f"{kind}: {text[start:end]!r} in {text[max(start - 40, 0) : end + 20]!r}")
            named[kind] += sum(n for f, n in shared.items() if f.kind == kind) >= half
        for f in found:
            findings[f.kind] += 1
            inside = sum(max(min(end, f.end) - max(start, f.start), 0) for kind, start, end in spans if kind == f.kind)
            right[f.kind] += inside >= (f.end - f.start) / 2
    return {
        kind: {
            "n": true[kind],
            "found": covered[kind] / true[kind] if true[kind] else float("nan"),
            "by name": named[kind] / true[kind] if true[kind] else float("nan"),
            "findings": findings[kind],
            "precision": right[kind] / findings[kind] if findings[kind] else float("nan"),
        }
        for kind in sorted(true | findings, key=lambda k: (k not in PATTERN_KINDS, -true[k]))
    }, missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--names", default="auto")
    parser.add_argument("--missed", action="store_true", help="list the true spans that were missed")
    options = parser.parse_args()
    table, missed = measured(json.loads(options.corpus.read_text(encoding="utf-8")), options.names)
    print(f"names: {options.names}\n\n| kind | n | found | by name | findings | precision |\n" + "| --- " * 6 + "|")
    for kind, row in table.items():
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        print(f"| {kind} | " + " | ".join(cells) + " |")
    if options.missed:
        print("\n".join(missed))


if __name__ == "__main__":
    main()
