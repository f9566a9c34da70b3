"""A commented starter recipe for somebody's data file."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from tunesmith import recipe
from tunesmith.conversation.message import Conversation
from tunesmith.data.opening import Broken
from tunesmith.data.prepare import answers_kind
from tunesmith.data.reading import DETECTION_ROWS, detect
from tunesmith.data.section import ColumnsSection, SourceSection
from tunesmith.data.sources import read_rows
from tunesmith.data.unusable import Unusable
from tunesmith.data.values import is_text
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
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", data.name.split(".")[0]).strip("-._")[:100] or "my-run"
    target = out or Path(f"{name}.yaml")
    if target.exists() and not force:
        raise RecipeError("is there already", where=str(target), fix="Choose another with --out, or use --force.")
    source, guessed = _source(data)
    layout = detect(source, data)
    answers: list[Conversation] = []
    rows, unusable, wrong = 0, 0, ""
    for number, row in read_rows(source, data):
        rows += 1
        try:
            if isinstance(row, Broken):
                raise Unusable(row.reason, row.why)
            if len(answers) == LOOKED_AT:
                continue
            answers.append(layout.read(row, source, str(number)))
        except Unusable as error:  # for `check` to report, with all the others
            unusable += 1
            wrong = wrong or f"row {number}: {error.why}"
    if not rows:
        raise DataError("holds no rows", where=str(data), fix="Give a file with rows.")
    if not answers:
        raise DataError(f"holds no row that can be used ({wrong})", where=str(data), fix="Mend its rows.")
    kind = answers_kind(answers)
    columns = f"\n      columns: {json.dumps(guessed, ensure_ascii=False)}" if guessed else ""
    path = data if data.is_absolute() else os.path.relpath(data.absolute(), target.absolute().parent)
    text = TEMPLATE.format(
        file=data.name,
        out=target,
        name=name if yaml.safe_load(name) == name else json.dumps(name),  # such as 2024 and true
        goal=GOALS[kind],
        kind=kind,
        path=json.dumps(str(path), ensure_ascii=False),
        layout=layout.name,
        columns=columns,
    )
    write_text(target, text)
    recipe.load(target)  # what we write must be valid
    return target, {
        "layout": layout.name,
        "columns": guessed,
        "rows": rows,
        "unusable": unusable,
        "answers": kind,
        "goal": GOALS[kind],
    }


def _source(data: Path) -> tuple[SourceSection, dict[str, str] | None]:
    """The source as detected; where no layout fits, two text columns are taken for question and answer.

    The one with the most text is most likely asked, the last of the others answered: not one that only
    holds numbers, if there is a choice, for that may well be a row's id.
    """
    plain = SourceSection(path=str(data))
    try:
        detect(plain, data)
        return plain, None
    except DataError:
        rows = itertools.islice(
            (row for _, row in read_rows(plain, data) if not isinstance(row, Broken)), DETECTION_ROWS
        )
        texts: dict[str, list[str]] = {}
        for row in rows:
            for column, value in row.items():
                if is_text(value) and value.strip():
                    texts.setdefault(column, []).append(value)
        if len(texts) < 2:
            raise
        asked = max(texts, key=lambda column: sum(map(len, texts[column])))
        others = [column for column in texts if column != asked]
        spoken = [column for column in others if not all(_is_number(value) for value in texts[column])]
        columns = {"prompt": asked, "completion": (spoken or others)[-1]}
        return plain.model_copy(update={"columns": ColumnsSection(**columns)}), columns


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
