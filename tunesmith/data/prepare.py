"""The data stage: sources -> conversations -> train, validation and test rows, with every row accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith import plugins
from tunesmith.conversation.message import Conversation, Message, Text, row_from_dict
from tunesmith.conversation.render import Renderer
from tunesmith.data.augment.base import Answers, Means
from tunesmith.data.augment.run import augmented
from tunesmith.data.canaries import canaries
from tunesmith.data.card import card
from tunesmith.data.clean.run import Cleaning
from tunesmith.data.clean.step import Around
from tunesmith.data.fit import Fit, fits, fitting
from tunesmith.data.layouts import Layout, Unusable
from tunesmith.data.ledger import Ledger, nothing_left, too_many_rejected
from tunesmith.data.marks import know_columns, marked
from tunesmith.data.opening import Broken, Row
from tunesmith.data.section import DataSection, SourceSection, placeholders
from tunesmith.data.shape import shape
from tunesmith.data.sources import Files, lines_in, origins, read_rows, source_files
from tunesmith.data.split import split
from tunesmith.data.tokens import Counting, tokens
from tunesmith.errors import DataError, nearest
from tunesmith.progress import bar
from tunesmith.runs import hash_file, hash_json, json_line, need_room, write_json

PARTS = ("train", "validation", "test")
DETECTION_ROWS = 50


@dataclass(frozen=True)
class DataInputs:
    """What the data stage works with: how rows are written as tokens, and how long they may be."""

    renderer: Renderer
    max_length: int
    seed: int
    folder: Path
    files: Files | None = None
    answers: Answers | None = None


def prepare(section: DataSection, inputs: DataInputs, target: Path) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl, test.jsonl, of the other rows rejected.jsonl, removed.jsonl, cut.jsonl and
    flagged.jsonl, what each step did (steps.json), and a card (README.md), into `target`.

    Returns what the manifest tells: counts, the answers' kind, and each source file's hash.

    Raises:
        DataError: a file or too many rows can't be used; says which and why.
    """
    files = inputs.files or source_files(section, inputs.folder)
    room = sum(path.stat().st_size for paths in files.values() for _, path in paths)
    need_room(target, 4 * room, "Preparing the data")
    ledger = Ledger()
    cleaning = Cleaning(section.clean, _usable, ledger)
    counting = Counting(inputs.renderer)

    def stop_if_too_many() -> None:
        error = too_many_rejected(section.max_rejected, ledger.read, ledger.rejected)
        if error is not None:
            raise error

    with bar("Reading rows", sum(lines_in(path) for paths in files.values() for _, path in paths)) as progress:
        parts = {
            part: [row for source, path in paths for row in _rows(source, path, section, ledger, progress.advance)]
            for part, paths in files.items()
        }
    stop_if_too_many()
    parts = cleaning.before_split(parts, Around(inputs.folder, inputs.seed))
    fit = Fit(counting, inputs.max_length)
    with bar("Measuring rows", sum(map(len, parts.values()))) as progress:
        for part, rows in parts.items():
            parts[part] = list(fitting(rows, section.over_length, fit, ledger, progress.advance))
    stop_if_too_many()

    every = [row for rows in parts.values() for row in rows]
    know_columns(every, section)
    rows_are = _one_kind(every)
    kind = answers_kind(every) if section.answers == "auto" else section.answers
    if parts["validation"] or parts["test"]:  # files of their own
        parts["train"] = cleaning.after_split(parts["train"], Around(inputs.folder, inputs.seed, parts))
    given = {part for part in PARTS if parts[part]}
    parts = split(section.split, parts, inputs.seed, kind == "label", ledger)
    if given == {"train"} or {part for part in PARTS if parts[part]} != given:
        parts["train"] = cleaning.after_split(parts["train"], Around(inputs.folder, inputs.seed, parts))
    if not parts["train"]:
        raise nothing_left(ledger, {part: len(parts[part]) for part in PARTS[1:]})
    more: dict[str, Any] = {}
    if section.augment:
        means = Means(inputs.seed, inputs.answers)
        parts["train"], more["augment"] = augmented(section.augment, parts, means, partial(fits, fit=fit), ledger)
    parts["train"] = shape(section, parts["train"], inputs.seed, ledger)
    if section.canaries:
        if rows_are != "conversation":
            raise DataError("canaries are conversations", where="data.canaries", fix="Leave them out for other rows.")
        planted = canaries(section.canaries, section.canary_repeats, section.system, inputs.seed)
        ledger.made += len(planted)
        parts["train"] = [*parts["train"], *planted]
    accepted = sum(len(rows) for rows in parts.values())
    ledger.balance(accepted)
    for part in PARTS:
        _write(target / f"{part}.jsonl", [row.as_dict() for row in parts[part]])
    for name in ("rejected", "removed", "cut", "flagged"):
        _write(target / f"{name}.jsonl", _hidden(getattr(ledger, name), cleaning))
    accounts = [account.as_dict() for account in cleaning.accounts.values()]
    write_json(target / "steps.json", accounts)
    labels = Counter(row.answer for row in every) if kind == "label" else {}
    told: dict[str, Any] = {
        "version": hash_json([hash_file(target / f"{part}.jsonl") for part in PARTS])[:16],
        "counts": {
            "read": ledger.read,
            "accepted": accepted,
            "rejected": len(ledger.rejected),
            "removed": ledger.steps,
            **({"made": ledger.made} if ledger.made else {}),
            **({"cut": len(ledger.cut)} if ledger.cut else {}),
            **({"flagged": len(ledger.flagged)} if ledger.flagged else {}),
            **{part: len(parts[part]) for part in PARTS},
        },
        "system": _shared_system(parts["train"]),
        "rows": rows_are,
        "specials": sum(inputs.renderer.specials_in(row) for row in every),
        "answers": {"kind": kind, "labels": dict(sorted(labels.items()))},
        "renderer": {"hash": inputs.renderer.hash, "template": inputs.renderer.template_name},
        **more,
        "tokens": {part: found for part in PARTS if (found := tokens(parts[part], counting, inputs.max_length))},
        "sources": origins(files),
        "inputs": {str(path): hash_file(path) for paths in files.values() for _, path in paths},
    }
    (target / "README.md").write_text(card(told, accounts), "utf-8")
    return told


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(map(json_line, rows)), "utf-8")


def _hidden(value: Any, cleaning: Cleaning) -> Any:
    """Rows as they may be written, all texts without what the recipe's steps take out of rows."""
    if isinstance(value, str):
        return cleaning.hide(value)
    if isinstance(value, list):
        return [_hidden(inner, cleaning) for inner in value]
    return {k: _hidden(v, cleaning) for k, v in value.items()} if isinstance(value, dict) else value


def _shared_system(rows: Sequence[Conversation]) -> str | None:
    """The system prompt that all rows have: what a chat with the tuned model opens with."""
    found = {row.messages[0].content if row.messages and row.messages[0].role == "system" else None for row in rows}
    return found.pop() if len(found) == 1 else None


def rows_of(section: DataSection, folder: Path) -> list[Conversation]:
    """Every row of the section's sources as conversations, none held out or measured.

    Raises:
        DataError: a file or too many rows can't be used.
    """
    ledger = Ledger()
    files = source_files(section, folder)["train"]
    with bar("Reading rows", sum(lines_in(path) for _, path in files)) as progress:
        rows = [row for source, path in files for row in _rows(source, path, section, ledger, progress.advance)]
    error = too_many_rejected(section.max_rejected, ledger.read, ledger.rejected)
    if error is not None:
        raise error
    return rows


def load_rows(file: Path) -> list[Conversation]:
    """The rows of a prepared file."""
    with file.open(encoding="utf-8") as lines:
        return [row_from_dict(json.loads(line)) for line in lines]


def detect(source: SourceSection, path: Path) -> type[Layout]:
    """The layout that fits most of a file's first rows.

    Raises:
        DataError: none fits, or a column that the source names is in no row; lists the columns.
    """
    if source.columns is not None:
        _know_columns(source, path)
    if source.columns is not None or source.layout != "auto":
        return plugins.load("layout", "columns" if source.columns is not None else source.layout)
    rows = []
    for _, row in read_rows(source, path):
        if not isinstance(row, Broken):
            rows.append(row)
        if len(rows) == DETECTION_ROWS:
            break
    layouts: list[type[Layout]] = [plugins.load("layout", name) for name in plugins.known("layout")]
    scores = [sum(layout.fits(row) for row in rows) for layout in layouts]
    if rows and max(scores) == 0:
        columns = ", ".join(dict.fromkeys(c for row in rows for c in row))
        fitting = "; ".join(f"{layout.name} ({layout.needs})" for layout in layouts if layout.name != "columns")
        raise DataError(
            f"no layout fits; its columns are: {columns}",
            where=str(path),
            fix=f"Say which are which: columns: {{prompt: ..., completion: ...}}. Known layouts: {fitting}.",
        )
    found = layouts[scores.index(max(scores))]
    if source.template is not None and not found.takes_template:
        raise DataError(
            f"its rows are of layout {found.name}, in which a template has nothing to fill",
            where=str(path),
            fix="Leave data.sources[].template out, or name the columns to use instead: columns.",
        )
    return found


def _know_columns(source: SourceSection, path: Path) -> None:
    named = [c for c in source.columns.model_dump().values() if c] if source.columns else []
    named += [c for _, c in placeholders(source.template or "") if c]
    seen: dict[str, None] = {}
    for _, row in read_rows(source, path):
        if not isinstance(row, Broken):
            seen |= dict.fromkeys(row)
        if all(c in seen for c in named):
            return
    absent = next(c for c in named if c not in seen)
    if seen:
        raise DataError(
            f"has no column '{absent}'{nearest(absent, seen)} (its columns: {', '.join(seen)})",
            where=str(path),
            fix="Check data.sources[].columns and template.",
        )


def _rows(
    source: SourceSection, path: Path, section: DataSection, ledger: Ledger, advance: Any
) -> Iterator[Conversation]:
    """A file's usable rows as conversations; the others go to the ledger."""
    layout = detect(source, path)
    system = source.system if source.system is not None else section.system
    before = ledger.read
    for number, row in read_rows(source, path):
        ledger.read += 1
        advance()
        where = f"{path.name}:{number}"
        if isinstance(row, Broken):
            ledger.reject(where, row.reason, row.why, row.text)
            continue
        if not _wanted(row, source, where):
            ledger.remove(None, where, "where", "does not meet the source's `where`")
            continue
        try:
            conversation = marked(layout.read(row, source, where), row, source, section)
            kept = {column: row[column] for column in source.keep if row.get(column) is not None}
            conversation = replace(conversation, metadata=conversation.metadata | kept) if kept else conversation
            _usable(conversation)
        except Unusable as error:
            ledger.reject(where, error.reason, error.why, json.dumps(row, ensure_ascii=False, default=str))
            continue
        yield conversation.with_system(system) if system is not None else conversation
    if ledger.read == before:
        raise DataError("holds no rows", where=str(path), fix="Give a file with rows.")


def _wanted(row: Row, source: SourceSection, where: str) -> bool:
    for column, value in source.where.items():
        if column not in row:
            raise DataError(
                f"has no column '{column}'{nearest(column, row)} (its columns: {', '.join(row)})",
                where=f"{where}, data.sources[].where",
                fix="Name a column of the file.",
            )
        if not any(_same(row[column], v) for v in (value if isinstance(value, list) else [value])):
            return False
    return True


def _same(found: Any, wanted: Any) -> bool:
    """Whether a row's value is the one asked for; CSV only has text, so a number or yes-no is compared as such."""
    if isinstance(found, str) and not isinstance(wanted, str):
        return found.strip().casefold() == str(wanted).casefold()
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)


def _usable(row: Conversation) -> None:
    if isinstance(row, Text):
        if not row.text.strip():
            raise Unusable("empty_text", "the text is empty")
        return
    for conversation in row.conversations:
        _answered(conversation.messages)
    if not any(m.role == "assistant" and m.weight for c in row.conversations for m in c.messages):
        raise Unusable("no_loss", "no token would carry loss: every answer's weight is 0")


def _answered(messages: Sequence[Message]) -> None:
    if not any(m.role == "assistant" for m in messages):
        raise Unusable("no_answer", "no assistant's turn to learn from")
    if messages[-1].role != "assistant":
        raise Unusable("ends_unanswered", f"ends with the {messages[-1].role}'s turn, not with an answer")
    if any(m.role == "assistant" and not m.content.strip() and "tool_calls" not in m.more for m in messages):
        raise Unusable("empty_answer", "the answer is empty")
    if not any(m.role == "user" and m.content.strip() for m in messages):
        raise Unusable("empty_prompt", "the prompt is empty")


def _one_kind(rows: Sequence[Conversation]) -> str:
    """The kind that all rows are of (`tunesmith/conversation/message.py`).

    Raises:
        DataError: there are several.
    """
    first = {row.kind: row.id for row in reversed(rows)}
    if len(first) > 1:
        found = ", ".join(f"{kind} ({where})" for kind, where in first.items())
        raise DataError(
            f"the rows are of several kinds: {found}",
            where="data.sources",
            fix="Give rows of one kind, or name the layout of each source: data.sources[].layout.",
        )
    return next(iter(first), "conversation")


def answers_kind(rows: Sequence[Conversation]) -> str:
    """What the answers look like: `json` objects, `label`s of a small set, `text`, `none` of
    plain texts, or `preference`."""
    answers = [row.answer.strip() for row in rows]
    if not any(row.messages for row in rows):
        return "none"
    if all(row.kind == "preference" for row in rows):
        return "preference"
    if all(a.startswith("{") and _is_object(a) for a in answers):
        return "json"
    short = all(len(a) <= 80 and "\n" not in a for a in answers)
    return "label" if short and 2 * len(set(answers)) <= len(answers) and len(set(answers)) > 1 else "text"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
