"""The data stage: sources -> conversations -> train, validation and test rows, with every row accounted for."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tunesmith import plugins
from tunesmith.conversation.message import Conversation, Message, Preference, Text, row_from_dict
from tunesmith.conversation.render import Renderer
from tunesmith.data.canaries import canaries
from tunesmith.data.layouts import Layout, Unusable
from tunesmith.data.marks import know_columns, marked
from tunesmith.data.opening import Broken, Row
from tunesmith.data.section import DataSection, SourceSection, placeholders
from tunesmith.data.shape import shape
from tunesmith.data.sources import Files, lines_in, origins, read_rows, source_files
from tunesmith.data.split import split
from tunesmith.errors import DataError, ModelError, nearest
from tunesmith.progress import bar
from tunesmith.runs import hash_file, json_line, need_room

PARTS = ("train", "validation", "test")
DETECTION_ROWS = 50
NAMED_AT_MOST = 5


@dataclass(frozen=True)
class DataInputs:
    """What the data stage works with: how rows are written as tokens, and how long they may be."""

    renderer: Renderer
    max_length: int
    seed: int
    folder: Path
    files: Files | None = None


@dataclass
class Ledger:
    """Where every row went. read + made = accepted + rejected + removed."""

    read: int = 0
    made: int = 0
    rejected: list[dict[str, Any]] = field(default_factory=list)
    removed: list[dict[str, Any]] = field(default_factory=list)
    cut: list[dict[str, str]] = field(default_factory=list)

    def reject(self, where: str, reason: str, why: str, text: str) -> None:
        self.rejected.append({"row": where, "reason": reason, "why": why, "text": text})

    def remove(self, row: Conversation | None, where: str, step: str, why: str) -> None:
        self.removed.append({"row": where, "step": step, "why": why} | (row.as_dict() if row else {}))


def prepare(section: DataSection, inputs: DataInputs, target: Path) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl, test.jsonl and, of the other rows, rejected.jsonl, removed.jsonl
    and cut.jsonl into `target`.

    Returns what the manifest tells: counts, the answers' kind, and each source file's hash.

    Raises:
        DataError: a file or too many rows can't be used; says which and why.
    """
    files = inputs.files or source_files(section, inputs.folder)
    room = sum(path.stat().st_size for paths in files.values() for _, path in paths)
    need_room(target, 4 * room, "Preparing the data")
    ledger = Ledger()

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
    with bar("Measuring rows", sum(map(len, parts.values()))) as progress:
        for part, rows in parts.items():
            parts[part] = list(_fitting(rows, section.over_length, inputs, ledger, progress.advance))
    stop_if_too_many()

    every = [row for rows in parts.values() for row in rows]
    know_columns(every, section)
    rows_are = _one_kind(every)
    kind = answers_kind(every) if section.answers == "auto" else section.answers
    parts = split(section.split, parts, inputs.seed, kind == "label", ledger)
    if not parts["train"]:
        raise _nothing_left(ledger, parts)
    parts["train"] = shape(section, parts["train"], inputs.seed, ledger)
    if section.canaries:
        if rows_are != "conversation":
            raise DataError("canaries are conversations", where="data.canaries", fix="Leave them out for other rows.")
        planted = canaries(section.canaries, section.canary_repeats, section.system, inputs.seed)
        ledger.made += len(planted)
        parts["train"] = [*parts["train"], *planted]
    for part in PARTS:
        (target / f"{part}.jsonl").write_text("".join(json_line(r.as_dict()) for r in parts[part]), "utf-8")
    (target / "rejected.jsonl").write_text("".join(map(json_line, ledger.rejected)), "utf-8")
    (target / "removed.jsonl").write_text("".join(map(json_line, ledger.removed)), "utf-8")
    (target / "cut.jsonl").write_text("".join(map(json_line, ledger.cut)), "utf-8")

    accepted = sum(len(rows) for rows in parts.values())
    if ledger.read + ledger.made != accepted + len(ledger.rejected) + len(ledger.removed):
        raise AssertionError(f"rows went missing: {ledger.read} read, {accepted} accepted")
    labels = Counter(row.answer for row in every) if kind == "label" else {}
    return {
        "counts": {
            "read": ledger.read,
            "accepted": accepted,
            "rejected": len(ledger.rejected),
            "removed": _steps(ledger),
            **({"made": ledger.made} if ledger.made else {}),
            **({"cut": len(ledger.cut)} if ledger.cut else {}),
            **{part: len(parts[part]) for part in PARTS},
        },
        "system": _shared_system(parts["train"]),
        "rows": rows_are,
        "specials": sum(inputs.renderer.specials_in(row) for row in every),
        "answers": {"kind": kind, "labels": dict(sorted(labels.items()))},
        "renderer": {"hash": inputs.renderer.hash, "template": inputs.renderer.template_name},
        "sources": origins(files),
        "inputs": {str(path): hash_file(path) for paths in files.values() for _, path in paths},
    }


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


def too_many_rejected(allowed: float, read: int, rejected: Sequence[dict[str, Any]]) -> DataError | None:
    """The error of a set of which a larger share than `allowed` can't be used."""
    if len(rejected) <= allowed * read:
        return None
    share = min(1.0, max(0.01, -(-100 * len(rejected) // read) / 100))
    return DataError(
        f"{len(rejected)} of {read} rows can't be used (data.max_rejected allows {allowed:.1%})\n{_named(rejected)}",
        where=rejected[0]["row"],
        fix="Mend the rows, or name another file."
        if len(rejected) == read
        else f"Mend the rows, or go on without them: --set data.max_rejected={share:g}",
    )


def _named(rows: Sequence[dict[str, Any]]) -> str:
    """The first rows and what is wrong with each, a line apiece."""
    lines = [f"  {row['row']}: {row['why']}" for row in rows[:NAMED_AT_MOST]]
    more = len(rows) - NAMED_AT_MOST
    return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))


def _nothing_left(ledger: Ledger, parts: dict[str, list[Conversation]]) -> DataError:
    out = ledger.rejected + ledger.removed
    removed = ", ".join(f"{n} removed ({step})" for step, n in _steps(ledger).items()) or "none removed"
    told = f"{ledger.read} rows read, {len(ledger.rejected)} rejected, {removed}"
    held = ", ".join(f"{len(parts[part])} held out for {part}" for part in PARTS[1:] if parts[part])
    return DataError(
        f"no row is left to train on: {told}{', ' + held if held else ''}" + (f"\n{_named(out)}" if out else ""),
        where="data",
        fix="Hold out fewer rows (data.split)."
        if held and not out
        else "Change what leaves those rows out, or mend them.",
    )


def _fitting(
    rows: Sequence[Conversation], policy: str, inputs: DataInputs, ledger: Ledger, advance: Any
) -> Iterator[Conversation]:
    """Rows that fit `max_length`, and what the policy makes of those that don't."""
    too_long: list[tuple[int, dict[str, str]]] = []
    for row in rows:
        advance()
        try:
            length = _measured(row, inputs.renderer)
        except Unusable as error:
            ledger.reject(row.id, error.reason, error.why, json.dumps(row.as_dict(), ensure_ascii=False))
            continue
        if length <= inputs.max_length:
            yield row
            continue
        why = f"has {length} tokens, train.max_length is {inputs.max_length}"
        if policy == "error":
            too_long.append((length, {"row": row.id, "why": why}))
            continue
        cuts = {"drop": _dropped, "truncate": _cut, "split": _dropped if isinstance(row, Preference) else _pieces}
        kept = cuts[policy](row, inputs)
        if kept:
            ledger.cut.append({"row": row.id, "why": f"{why}: {_what_became(kept)}"})
        else:
            ledger.remove(row, row.id, "over_length", why)
        ledger.made += max(len(kept) - 1, 0)
        yield from kept
    if too_long:
        raise DataError(
            f"{len(too_long)} of {len(rows)} rows are too long\n{_named([told for _, told in too_long])}",
            where=too_long[0][1]["row"],
            fix=f"Raise train.max_length (the longest needs {max(length for length, _ in too_long)}), or say "
            "what to do with such rows: --set data.over_length=drop, truncate or split.",
        )


def _measured(row: Conversation, renderer: Renderer) -> int:
    """A row's length in tokens: of its longer ending where it has two, and 0 of a plain text, which is cut anyway.

    Raises:
        Unusable: the model's template refuses it, leaves out a part of it, or leaves nothing in it to learn.
    """
    if (row.tools or any("tool_calls" in m.more for m in row.messages)) and not renderer.writes_tools:
        raise Unusable("no_tools", "this model's chat template writes no tools and calls of them")
    try:
        rendered = [renderer.render(conversation) for conversation in row.conversations]
    except ModelError as error:
        raise Unusable("refused_by_template", error.what) from error
    if not all(r.trained for r in rendered):
        raise Unusable("no_loss", "no token of it carries loss under the model's chat template")
    return max(map(len, rendered), default=0)


def _what_became(kept: Sequence[Conversation]) -> str:
    if len(kept) > 1:
        return f"cut into {len(kept)} rows"
    cut = kept[0].metadata.get("cut_characters")
    return f"{cut} characters cut off" if cut else "cut into 1 row"


def _dropped(row: Conversation, inputs: DataInputs) -> list[Conversation]:
    return []


def _cut(row: Conversation, inputs: DataInputs) -> list[Conversation]:
    """The row with the end of its longest message that is not an answer cut off, or nothing if that is not enough."""
    others = [i for i, m in enumerate(row.messages) if m.role != "assistant"]
    longest = max(others, key=lambda i: len(row.messages[i].content))
    text = row.messages[longest].content

    def shortened(length: int) -> Conversation:
        message = replace(row.messages[longest], content=text[:length])
        messages = (*row.messages[:longest], message, *row.messages[longest + 1 :])
        return replace(row, messages=messages, metadata=row.metadata | {"cut_characters": len(text) - length})

    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if _longest(shortened(middle), inputs) <= inputs.max_length:
            low = middle
        else:
            high = middle - 1
    return [shortened(low)] if low and _longest(shortened(low), inputs) <= inputs.max_length else []


def _longest(row: Conversation, inputs: DataInputs) -> int:
    return max(len(inputs.renderer.render(conversation)) for conversation in row.conversations)


def _pieces(row: Conversation, inputs: DataInputs) -> list[Conversation]:
    """The row cut between turns into rows that fit, each with the system message; nothing if a turn is too long."""
    system = [m for m in row.messages[:1] if m.role == "system"]
    turns: list[list[Message]] = [[]]
    for message in row.messages[len(system) :]:
        turns[-1].append(message)
        if message.role == "assistant":
            turns.append([])
    pieces: list[list[Message]] = []
    for turn in filter(None, turns):
        longer = [*pieces[-1], *turn] if pieces else None
        if longer and _length(system + longer, inputs) <= inputs.max_length:
            pieces[-1] = longer
        elif _length(system + turn, inputs) <= inputs.max_length:
            pieces.append(turn)
        else:
            return []
    taught = [p for p in pieces if any(m.role == "assistant" and m.weight for m in p)]
    return [replace(row, messages=tuple(system + p), id=f"{row.id}#{i}") for i, p in enumerate(taught, 1)]


def _length(messages: list[Message], inputs: DataInputs) -> float:
    try:
        return len(inputs.renderer.render(Conversation(tuple(messages))))
    except ModelError:  # a template may refuse a piece, such as one that opens with an answer
        return math.inf


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


def _steps(ledger: Ledger) -> dict[str, int]:
    return dict(Counter(row["step"] for row in ledger.removed))
