"""A commented starter recipe for somebody's data file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tunesmith import recipe
from tunesmith.conversation.message import Conversation
from tunesmith.data.prepare import answers_kind, detect, read_rows
from tunesmith.data.readers import Broken
from tunesmith.data.section import ColumnsSection, SourceSection
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.metrics import FITTING
from tunesmith.runs import write_text

LOOKED_AT = 2000
GOALS = {kind: metrics[0] for kind, metrics in FITTING.items()}

TEMPLATE = """\
# Tunesmith recipe, made for {file}. Check it: tunesmith check {out}; run it: tunesmith run {out}
# Every key: tunesmith schema
name: {name}
seed: 7
goal: {{metric: {goal}}}        # decides the verdict; the answers look like: {kind}
model: smollm2-135m-instruct   # or a folder, a .gguf file, a hub id such as Qwen/Qwen3-0.6B
data:
  sources:
    - path: {path}   # layout: {layout}{columns}
  # system: You are a careful assistant.    # for rows that bring no system prompt
  split: {{validation: 0.1, test: 0.1}}      # shares, counts, or files of their own
  over_length: error                       # or drop, truncate, split: for rows beyond train.max_length
  max_rejected: 0                          # share of unusable rows that does not stop the run
train:
  method: sft
  adapter: {{kind: lora, rank: 16, alpha: 32, targets: all-linear}}
  epochs: 3
  learning_rate: 2.0e-4                    # small models and short answers often want 1.0e-3
  batch_size: 16
  max_length: 1024
evaluate: {{}}
package: {{}}
"""


def write_starter(data: Path, out: Path | None, force: bool) -> tuple[Path, dict[str, Any]]:
    """Write a recipe for `data`; returns its path and what was detected.

    Raises:
        DataError: the file is missing, empty, or of columns that nothing can be made of.
        RecipeError: the recipe's file is there already.
    """
    if not data.is_file():
        raise DataError(f"no such file: {data}", where="DATA", fix="Give the file that holds your rows.")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.name.split(".")[0]).strip("-.") or "my-run"
    target = out or Path(f"{name}.yaml")
    if target.exists() and not force:
        raise RecipeError("is there already", where=str(target), fix="Choose another with --out, or use --force.")
    source, guessed = _source(data)
    layout = detect(source, data)
    answers, rows = [], 0
    for number, row in read_rows(source, data):
        rows += 1
        if rows <= LOOKED_AT and not isinstance(row, Broken):
            try:
                answers.append(Conversation(tuple(layout.messages(row, source)), str(number)))
            except Exception as error:  # a bad row is for `check` to report, with all the others
                del error
    kind = answers_kind(answers) if answers else "text"
    columns = f"\n      columns: {json.dumps(guessed)}".replace('"', "") if guessed else ""
    path = data if data.is_absolute() else Path("../" * len(target.parent.parts)) / data
    text = TEMPLATE.format(
        file=data.name,
        out=target,
        name=name,
        goal=GOALS[kind],
        kind=kind,
        path=json.dumps(str(path)),
        layout=layout.name,
        columns=columns,
    )
    write_text(target, text)
    recipe.load(target)  # what we write must be valid
    return target, {
        "layout": layout.name,
        "columns": guessed,
        "rows": rows,
        "answers": kind,
        "goal": GOALS[kind],
    }


def _source(data: Path) -> tuple[SourceSection, dict[str, str] | None]:
    """The source as detected; where no layout fits, two text columns are taken for question and answer."""
    plain = SourceSection(path=str(data))
    try:
        detect(plain, data)
        return plain, None
    except DataError:
        first = next((row for _, row in read_rows(plain, data) if not isinstance(row, Broken)), {})
        texts = [c for c, v in first.items() if isinstance(v, str)]
        if len(texts) < 2:
            raise
        # The longest text is most likely asked, the last of the others answered.
        asked = max(texts, key=lambda c: len(str(first[c])))
        answered = [c for c in texts if c != asked][-1]
        columns = {"prompt": asked, "completion": answered}
        return plain.model_copy(update={"columns": ColumnsSection(**columns)}), columns
