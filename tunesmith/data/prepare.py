"""The data stage: sources -> conversations -> train, validation and test rows, with every row accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tunesmith.conversation.message import Conversation, row_from_dict
from tunesmith.conversation.render import Renderer
from tunesmith.data.augment.base import Answers, Means
from tunesmith.data.augment.run import augmented
from tunesmith.data.canaries import canaries
from tunesmith.data.card import card
from tunesmith.data.clean.run import Cleaning
from tunesmith.data.clean.step import Around
from tunesmith.data.engines.engine import Running
from tunesmith.data.fit import Fit, fits, measured
from tunesmith.data.groups import DIGEST, digest
from tunesmith.data.ledger import LISTS, Ledger, nothing_left, too_many_rejected
from tunesmith.data.marks import bare, know_columns
from tunesmith.data.reading import read_parts, usable
from tunesmith.data.section import DataSection
from tunesmith.data.shape import mixture, shape
from tunesmith.data.shelf import Rows, Shelf, joined
from tunesmith.data.sources import Files, origins, source_files
from tunesmith.data.split import split
from tunesmith.data.tokens import tokens
from tunesmith.errors import DataError
from tunesmith.runs import hash_file, hash_json, json_line, need_room, write_json

PARTS = ("train", "validation", "test")
ROOM = 6  # times the sources: rows, those that were changed, and what near-duplicates are found by


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
    need_room(target, ROOM * room, "Preparing the data")
    with TemporaryDirectory(prefix=".rows-", dir=target) as name, section.engine.start(Path(name)) as engine:
        return _prepared(section, inputs, files, target, Shelf(Path(name)), engine)


def _prepared(
    section: DataSection, inputs: DataInputs, files: Files, target: Path, shelf: Shelf, engine: Running
) -> dict[str, Any]:
    ledger = Ledger(shelf.folder)
    cleaning = Cleaning(section.clean, usable, ledger, shelf)

    def stop_if_too_many() -> None:
        error = too_many_rejected(section.max_rejected, ledger.read, ledger.rejected)
        if error is not None:
            raise error

    parts = read_parts(section, files, engine, shelf, ledger)
    stop_if_too_many()
    around = Around(inputs.folder, inputs.seed, {}, engine, shelf.folder)
    parts = cleaning.before_split(parts, around)
    fit = Fit(inputs.renderer, inputs.max_length)
    parts, lengths, specials = measured(parts, section.over_length, fit, engine, shelf, ledger)
    stop_if_too_many()

    every = joined(parts.values(), shelf)
    know_columns(every, section)
    rows_are, media = _one_kind(every)
    kind = answers_kind(every) if section.answers == "auto" else section.answers
    if parts["validation"] or parts["test"]:  # files of their own
        parts["train"] = cleaning.after_split(parts["train"], replace(around, held=parts))
    given = {part for part in PARTS if parts[part]}
    parts, sides = split(section.split, parts, kind == "label", ledger, around)
    if given == {"train"} or {part for part in PARTS if parts[part]} != given:
        parts["train"] = cleaning.after_split(parts["train"], replace(around, held=parts))
    if not parts["train"]:
        raise nothing_left(ledger, {part: len(parts[part]) for part in PARTS[1:]})
    more: dict[str, Any] = {}
    if section.augment:
        means = Means(inputs.seed, inputs.answers)
        made, more["augment"] = augmented(section.augment, parts, means, partial(fits, fit=fit), ledger)
        parts["train"] += shelf.put(made)
    parts["train"] = shape(section, parts["train"], inputs.seed, ledger)
    if section.mix:
        more["mix"] = mixture(parts["train"])
    if section.canaries:
        if rows_are != "conversation":
            raise DataError("canaries are conversations", where="data.canaries", fix="Leave them out for other rows.")
        planted = canaries(section.canaries, section.canary_repeats, section.system, inputs.seed)
        ledger.made["canaries"] += len(planted)
        parts["train"] += shelf.put(planted)
    ledger.balance(sum(map(len, parts.values())))
    _write(target, parts, ledger, cleaning, bool(section.columns_named))
    accounts = [account.as_dict() for account in cleaning.accounts.values()]
    write_json(target / "steps.json", accounts)
    labels = Counter(row.answer for row in every) if kind == "label" else {}
    sizes = {part: lengths.of(parts[part], inputs.renderer) for part in PARTS}
    told: dict[str, Any] = {
        "version": hash_json([hash_file(target / f"{part}.jsonl") for part in PARTS])[:16],
        "counts": _counts(parts, ledger),
        "system": _shared_system(parts["train"]),
        "rows": rows_are,
        **({"media": dict(media)} if media else {}),
        "specials": specials,
        **({"split": sides} if sides else {}),
        "answers": {"kind": kind, "labels": dict(sorted(labels.items()))},
        "renderer": {"hash": inputs.renderer.hash, "template": inputs.renderer.template_name},
        **more,
        "tokens": {part: found for part in PARTS if (found := tokens(sizes[part], inputs.max_length))},
        "sources": origins(files),
        "inputs": {str(path): hash_file(path) for paths in files.values() for _, path in paths},
    }
    (target / "README.md").write_text(card(told, accounts), "utf-8")
    return told


def _write(target: Path, parts: Mapping[str, Rows], ledger: Ledger, cleaning: Cleaning, marked: bool) -> None:
    """The rows of each part, and those that were not taken as they were. `marked`: they have columns of the stage's."""
    for part in PARTS:
        lines = (line.decode("utf-8", "surrogatepass") for line in parts[part].lines())
        with (target / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines((json_line(bare(row).as_dict()) for row in parts[part]) if marked else lines)
    for name in LISTS:
        with (target / f"{name}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json_line(_hidden(entry, cleaning)) for entry in getattr(ledger, name))


def _counts(parts: Mapping[str, Rows], ledger: Ledger) -> dict[str, Any]:
    return {
        "read": ledger.read,
        "accepted": sum(map(len, parts.values())),
        "rejected": len(ledger.rejected),
        "removed": dict(ledger.steps),
        **({"made": dict(ledger.made)} if ledger.made else {}),
        **({"cut": len(ledger.cut)} if len(ledger.cut) else {}),
        **({"flagged": len(ledger.flagged)} if len(ledger.flagged) else {}),
        **{part: len(parts[part]) for part in PARTS},
    }


def _hidden(value: Any, cleaning: Cleaning) -> Any:
    """Rows as they may be written, all texts without what the recipe's steps take out of rows."""
    if isinstance(value, str):
        return cleaning.hide(value)
    if isinstance(value, list):
        return [_hidden(inner, cleaning) for inner in value]
    return {k: _hidden(v, cleaning) for k, v in value.items()} if isinstance(value, dict) else value


def _shared_system(rows: Sequence[Conversation]) -> str | None:
    """The system prompt that all rows have: what a chat with the tuned model opens with."""
    shared: str | None = None
    for number, row in enumerate(rows):
        found = row.messages[0].content if row.messages and row.messages[0].role == "system" else None
        if found is None or (number and found != shared):
            return None
        shared = found
    return shared


def rows_of(section: DataSection, folder: Path) -> list[Conversation]:
    """Every row of the section's sources as conversations, none held out or measured.

    Raises:
        DataError: a file or too many rows can't be used.
    """
    ledger = Ledger()
    files = {"train": source_files(section, folder)["train"]}
    with TemporaryDirectory() as name, section.engine.start(Path(name)) as engine:
        rows = list(read_parts(section, files, engine, Shelf(Path(name)), ledger)["train"])
    error = too_many_rejected(section.max_rejected, ledger.read, ledger.rejected)
    if error is not None:
        raise error
    return rows


def load_rows(file: Path) -> list[Conversation]:
    """The rows of a prepared file."""
    with file.open(encoding="utf-8") as lines:
        return [row_from_dict(json.loads(line)) for line in lines]


def _one_kind(rows: Sequence[Conversation]) -> tuple[str, Counter[str]]:
    """The kind that all rows are of (`tunesmith/conversation/message.py`), and how many rows hold images or sounds.

    Raises:
        DataError: there are several.
    """
    first: dict[str, str] = {}
    media: Counter[str] = Counter()
    for row in rows:
        first.setdefault(row.kind, row.id)
        media.update({one.kind for one in row.media})
    if len(first) > 1:
        found = ", ".join(f"{kind} ({where})" for kind, where in first.items())
        raise DataError(
            f"the rows are of several kinds: {found}",
            where="data.sources",
            fix="Give rows of one kind, or name the layout of each source: data.sources[].layout.",
        )
    return next(iter(first), "conversation"), media


def answers_kind(rows: Sequence[Conversation]) -> str:
    """What the answers look like: `json` objects, `label`s of a small set, `text`, `none` of
    plain texts, or `preference`."""
    objects = short = preferences = True
    said, count = False, 0
    answers = bytearray()  # digests, for as long as the answers may be labels
    for row in rows:
        answer = row.answer.strip()
        count += 1
        said = said or bool(row.messages)
        preferences = preferences and row.kind == "preference"
        objects = objects and answer.startswith("{") and _is_object(answer)
        short = short and len(answer) <= 80 and "\n" not in answer
        if short:
            answers += digest(answer)
    if not said:
        return "none"
    if preferences:
        return "preference"
    if objects:
        return "json"
    different = len(np.unique(np.frombuffer(answers, dtype=DIGEST))) if short else 0
    return "label" if short and 2 * different <= count and different > 1 else "text"


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
