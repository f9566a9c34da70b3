"""Files -> rows on a shelf: each file is cut into pieces, and each piece is read by whichever process is free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from tunesmith import plugins
from tunesmith.conversation.message import Conversation, Message, Text
from tunesmith.data.engines.engine import Running
from tunesmith.data.formats import format_of
from tunesmith.data.layouts import Layout
from tunesmith.data.ledger import Ledger, Saved
from tunesmith.data.marks import marked
from tunesmith.data.media import Looked, beside, counted, placed
from tunesmith.data.opening import Broken, Row, Span, spans
from tunesmith.data.section import DataSection, SourceSection, placeholders
from tunesmith.data.shelf import Places, Rows, Shelf, joined
from tunesmith.data.sources import Files, lines_in, read_rows, told_apart
from tunesmith.data.unusable import Unusable
from tunesmith.errors import DataError, nearest
from tunesmith.progress import bar

DETECTION_ROWS = 50
CUT = ("jsonl", "ndjson")  # formats of which a part can be read without what is before it


@dataclass(frozen=True)
class Piece:
    """What one process reads: a file, or a span of one whose lines are rows.

    Attributes:
        name: what tells the file from the others.
        shard: the number of the shard that the rows go to.
    """

    part: str
    source: SourceSection
    path: Path
    name: str
    layout: type[Layout]
    span: Span | None
    shard: int


@dataclass(frozen=True)
class Read:
    """Reads a piece onto a shelf: (the rows' places, the ledger of the others)."""

    section: DataSection
    shelf: Shelf

    def __call__(self, piece: Piece) -> tuple[Places, Saved]:
        ledger = Ledger(self.shelf.folder)
        with self.shelf.writer(piece.shard) as writer:
            for row in _rows(piece, self.section, ledger):
                writer.add(row)
        return writer.places, ledger.save(self.shelf.folder / f"read-{piece.shard}")


def read_parts(section: DataSection, files: Files, engine: Running, shelf: Shelf, ledger: Ledger) -> dict[str, Rows]:
    """Every part's rows.

    Raises:
        DataError: a file holds no rows, is damaged, or of no known layout.
    """
    pieces: list[Piece] = []
    total = 0
    called = told_apart(path for pairs in files.values() for _, path in pairs)
    for part, paths in files.items():
        for source, path in paths:
            layout = detect(source, path)
            cut: list[Span] | list[None]
            if format_of(path, source.format) in CUT and (found := spans(path)):
                cut, lines = found, sum(span.lines for span in found)
            else:
                cut, lines = [None], lines_in(path)
            pieces += [Piece(part, source, path, called[path], layout, span, shelf.number()) for span in cut]
            total += lines
    found_rows: dict[str, list[Rows]] = {part: [] for part in files}
    read_of: dict[tuple[str, int, Path], int] = {}
    with bar("Reading rows", total) as progress:
        for piece, (places, saved) in zip(pieces, engine.map(Read(section, shelf), pieces, total), strict=True):
            ledger.add(saved)
            found_rows[piece.part].append(Rows(shelf, places))
            of = (piece.part, id(piece.source), piece.path)
            read_of[of] = read_of.get(of, 0) + saved.read
            progress.advance(saved.read)
    for (_, _, path), read in read_of.items():
        if not read:
            raise DataError("holds no rows", where=str(path), fix="Give a file with rows.")
    return {part: joined(rows, shelf) for part, rows in found_rows.items()}


def _rows(piece: Piece, section: DataSection, ledger: Ledger) -> Iterator[Conversation]:
    """A piece's usable rows as conversations; the others go to the ledger."""
    source = piece.source
    columns = section.columns_kept
    look = Looked(Path(source.media_folder) if source.media_folder else piece.path.parent)

    def conversation(row: Row, where: str) -> Conversation | None:
        read = placed(piece.layout.read(row, source, where), beside(row, source))
        made = _with_media(read, where, section.media, look, ledger) if read.media else read
        if made is None:
            return None
        made = marked(made, row, source, columns, section.split.time)
        kept = {column: row[column] for column in source.keep if row.get(column) is not None}
        made = replace(made, metadata=made.metadata | kept) if kept else made
        usable(made)
        system = source.system if source.system is not None else section.system
        return made.with_system(system) if system is not None else made

    for number, row in read_rows(source, piece.path, piece.span):
        ledger.read += 1
        where = f"{piece.name}:{number}"
        if isinstance(row, Broken):
            ledger.reject(where, row.reason, row.why, row.text)
        elif not _wanted(row, source, where):
            ledger.remove(None, where, "where", "does not meet the source's `where`")
        else:
            try:
                made = conversation(row, where)
            except Unusable as error:
                ledger.reject(where, error.reason, error.why, json.dumps(row, ensure_ascii=False))
                continue
            if made is not None:
                yield made


def _with_media(row: Conversation, where: str, policy: str, look: Looked, ledger: Ledger) -> Conversation | None:
    """A row with images or sounds as `data.media` wants it; None where it goes."""
    if policy == "drop":
        ledger.remove(row, where, "media", f"holds {counted(row)}")
        return None
    if policy == "words":
        ledger.cut.append({"row": where, "why": f"{counted(row)} left out"})
        return row.words
    return look(row)


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
        odd = next((f"{c}: {v!r:.60}" for row in rows for c, v in row.items() if not isinstance(v, str | list)), None)
        some = f"; some are no text ({odd})" if odd and {"prompt", "completion"} <= {c for r in rows for c in r} else ""
        raise DataError(
            f"no layout fits; its columns are: {columns}{some}",
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
    if isinstance(found, str) and isinstance(wanted, bool):
        return found.strip().casefold() == str(wanted).casefold()
    if isinstance(found, str) and not isinstance(wanted, str):
        try:
            return Decimal(found.strip()) == Decimal(str(wanted))
        except InvalidOperation:
            return False
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)


def usable(row: Conversation) -> None:
    """Raise Unusable for a row that nothing can be learnt from."""
    if isinstance(row, Text):
        if not row.text.strip():
            raise Unusable("empty_text", "the text is empty")
        return
    for conversation in row.conversations:
        _answered(conversation.messages)
        _defined(conversation)
    if not any(m.role == "assistant" and m.weight for c in row.conversations for m in c.messages):
        raise Unusable("no_loss", "no token would carry loss: every answer's weight is 0")


def _defined(row: Conversation) -> None:
    """Raise for a call of a tool that is not among those defined; rows without definitions may tell them in words."""
    if not row.tools:
        return
    called = [call["function"]["name"] for m in row.messages for call in m.more.get("tool_calls", ())]
    names = [tool["function"].get("name") for tool in row.tools if isinstance(tool.get("function"), dict)]
    unknown = next((name for name in called if name not in names), None)
    if unknown is not None:
        known = ", ".join(map(str, names))
        raise Unusable("unknown_tool", f"calls '{unknown}'{nearest(unknown, filter(None, names))}; its tools: {known}")


def _answered(messages: Sequence[Message]) -> None:
    roles = [m.role for m in messages]
    if "assistant" not in roles:
        raise Unusable("no_answer", "no assistant's turn to learn from")
    if roles[-1] != "assistant":
        raise Unusable("ends_unanswered", f"ends with the {roles[-1]}'s turn, not with an answer")
    empty = [not m.content or m.content.isspace() for m in messages]
    if any(
        nothing and role == "assistant" and "tool_calls" not in m.more
        for role, nothing, m in zip(roles, empty, messages, strict=True)
    ):
        raise Unusable("empty_answer", "the answer is empty")
    if ("user", False) not in zip(roles, empty, strict=True):
        raise Unusable("empty_prompt", "the prompt is empty")
