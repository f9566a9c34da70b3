"""Fill docs/data.md's tables: formats and layouts from the plugins, and what real files come to. `--check` compares.

The last table is made of a folder of test data (TUNESMITH_TEST_DATA); without one it stays as it is.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tunesmith import plugins
from tunesmith.data.media import Looked, beside, placed
from tunesmith.data.opening import Broken
from tunesmith.data.reading import detect, usable
from tunesmith.data.section import SourceSection
from tunesmith.data.sources import read_rows
from tunesmith.data.unusable import Unusable

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
MEDIA = (".png", ".mp3", ".wav", ".flac")
# The files that need a line in the recipe.
LINES: dict[str, dict[str, str]] = {
    "INDEX.tsv": {"prompt": "path", "completion": "good_for"},
    "annotators/bbq_mturk_validations_finalval.csv": {
        "context": "q1_input", "prompt": "q1_question", "completion": "Answer.q1"},
    "banking77/test.csv": {"prompt": "text", "completion": "category"},
    "banking77/train.csv": {"prompt": "text", "completion": "category"},
    "bbq/Age.jsonl": {"context": "context", "prompt": "question", "completion": "label"},
    "benchmarks/arc_easy.jsonl": {"context": "choices", "prompt": "query", "completion": "gold"},
    "benchmarks/copa.jsonl": {"context": "choices", "prompt": "query", "completion": "gold"},
    "benchmarks/openbook_qa.jsonl": {"context": "choices", "prompt": "query", "completion": "gold"},
    "benchmarks/svamp.jsonl": {"prompt": "context", "completion": "answer"},
    "benchmarks/winograd_wsc.jsonl": {"prompt": "context_options", "completion": "continuation"},
    "bias/crows_pairs_anonymized.csv": {"prompt": "sent_more", "completion": "bias_type"},
    "code/human_eval_return_simple.jsonl": {"prompt": "prompt", "completion": "canonical_solution"},
    "formats/llm_foundry_arc_easy_train.jsonl": {"context": "choices", "prompt": "query", "completion": "gold"},
    "formats/torchtune/stack_exchange_paired_tiny.json": {
        "prompt": "question", "chosen": "response_j", "rejected": "response_k"},
    "formats/torchtune/vqa_tiny.json": {"prompt": "input", "completion": "output"},
    "legal/abercrombie_test.tsv": {"prompt": "text", "completion": "label"},
    "legal/abercrombie_train.tsv": {"prompt": "text", "completion": "label"},
    "legal/hearsay_test.tsv": {"prompt": "text", "completion": "label"},
    "legal/hearsay_train.tsv": {"prompt": "text", "completion": "label"},
    "legal/overruling_test.tsv": {"prompt": "text", "completion": "label"},
    "legal/overruling_train.tsv": {"prompt": "text", "completion": "label"},
    "medical/mts_dialog_train.csv": {"prompt": "dialogue", "completion": "section_text"},
    "medical/mts_dialog_validation.csv": {"prompt": "dialogue", "completion": "section_text"},
    "mt_bench/question.jsonl": {"prompt": "turns", "completion": "category"},
    "pii/presidio_synth_dataset_v2.json": {"prompt": "full_text", "completion": "masked"},
    "toxicity/davidson_labeled_data.csv": {"prompt": "tweet", "completion": "class"},
}  # fmt: skip


def formats() -> str:
    lines = ["| format | how it is read |", "| --- | --- |"]
    for name in plugins.known("reader"):
        lines.append(f"| `{name}` | {first_sentence(plugins.load('reader', name))} |")
    return "\n".join(lines)


def layouts() -> str:
    lines = ["| layout | needs | what it is |", "| --- | --- | --- |"]
    for name in plugins.known("layout"):
        layout = plugins.load("layout", name)
        lines.append(f"| `{name}` | {layout.needs} | {first_sentence(layout)} |")
    return "\n".join(lines)


def first_sentence(thing: Any) -> str:
    return " ".join((thing.__doc__ or "").split("\n\n")[0].split()).replace("|", "\\|")


def real_files(root: Path) -> str:
    lines = ["| file | layout | `columns:` | rows | rejected |", "| --- | --- | --- | --: | --- |"]
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.suffix not in MEDIA):
        name = path.relative_to(root).as_posix()
        layout, counts = loaded(path, LINES.get(name))
        rejected = ", ".join(f"{n} `{reason}`" for reason, n in sorted(counts.items()) if reason) or "0"
        columns = ", ".join(f"{k}: {v}" for k, v in LINES.get(name, {}).items())
        lines.append(f"| {name} | {layout} | {columns} | {counts.total():,} | {rejected} |")
    return "\n".join(lines)


def loaded(path: Path, columns: dict[str, str] | None) -> tuple[str, Counter[str]]:
    """A file's layout, and its rows by the reason why they can't be used ("" for those that can)."""

    source = SourceSection.model_validate({"path": str(path), "columns": columns})
    layout, look = detect(source, path), Looked(path.parent)
    counts: Counter[str] = Counter()
    for number, row in read_rows(source, path):
        if isinstance(row, Broken):
            counts[row.reason] += 1
            continue
        try:
            usable(look(placed(layout.read(row, source, str(number)), beside(row, source))))
        except Unusable as error:
            counts[error.reason] += 1
        else:
            counts[""] += 1
    return layout.name, counts


def filled(text: str) -> str:
    tables = {"formats": formats(), "layouts": layouts()}
    if folder := os.environ.get("TUNESMITH_TEST_DATA"):
        tables["real files"] = real_files(Path(folder))
    for name, table in tables.items():
        start, found, rest = text.partition(f"<!-- {name}: made by tools/data_page.py -->\n")
        text = start + found + table + "\n" + rest[rest.index("<!-- end -->") :]
    return text


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        sys.exit(text != filled(text))
    PAGE.write_text(filled(text), encoding="utf-8")


if __name__ == "__main__":
    main()
