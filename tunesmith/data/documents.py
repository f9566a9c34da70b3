"""Texts and documents -> rows of plain text, `{text: ...}`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.opening import PACKED, Broken, Rows, lines, not_utf8, opened, shown
from tunesmith.errors import DataError, MachineError, first_line

LARGEST_DOCUMENT = 512 * 2**20  # bytes, unpacked


def read_lines(path: Path) -> Rows:
    """A line is a row, as `datasets` reads text. Blank lines are not rows."""
    with opened(path) as file:
        for number, line in enumerate(lines(path, file), 1):
            if isinstance(line, Broken):
                yield number, line
            elif not_utf8(line):
                yield number, Broken("not_utf8", "is not UTF-8", shown(line.rstrip("\r\n")))
            elif line.strip():
                yield number, {"text": line.rstrip("\r\n")}


def read_paragraphs(path: Path) -> Rows:
    """Lines up to a blank one are a row; it has the number of its first line."""
    held: list[str] = []
    start = last = 0
    for number, row in read_lines(path):
        if held and (number != last + 1 or isinstance(row, Broken)):
            yield start, {"text": "\n".join(held)}
            held = []
        if isinstance(row, Broken):
            yield number, row
            continue
        start = start if held else number
        last = number
        held.append(row["text"])
    if held:
        yield start, {"text": "\n".join(held)}


def read_document(path: Path) -> Rows:
    """The whole file is one row."""
    text = _text(path)
    if isinstance(text, Broken) or text.strip():
        yield 1, text if isinstance(text, Broken) else {"text": text.strip("\r\n")}


def read_html(path: Path) -> Rows:
    """A page as Markdown: headings, lists, tables and links stay; scripts and styles go."""
    text = _text(path)
    if isinstance(text, Broken):
        yield 1, text
        return

    def convert() -> str:
        from bs4 import BeautifulSoup
        from markdownify import MarkdownConverter

        page = BeautifulSoup(text, "html.parser")
        for tag in page(["script", "style", "noscript", "template", "head"]):
            tag.decompose()
        return str(MarkdownConverter(heading_style="ATX").convert_soup(page))

    yield from _converted(path, "an HTML page", convert)


def read_pdf(path: Path) -> Rows:
    """A document's text, page after page, a blank line apart. A scanned page holds no text and gives none."""

    def convert() -> str:
        from pypdf import PdfReader

        with _unpacked(path).open("rb") as file:
            return "\n\n".join(page.extract_text() for page in PdfReader(file).pages)

    yield from _converted(path, "a PDF", convert)


def read_docx(path: Path) -> Rows:
    """A document's paragraphs and tables in their order; headings and lists as Markdown."""

    def convert() -> str:
        import docx
        from docx.table import Table

        _refuse_bomb(_unpacked(path))
        parts = []
        for part in docx.Document(str(path)).iter_inner_content():
            if isinstance(part, Table):
                parts.append("\n".join(" | ".join(cell.text for cell in row.cells) for row in part.rows))
            elif part.text.strip():
                style = part.style.name if part.style is not None and part.style.name else ""
                level = style.removeprefix("Heading ") if style.startswith("Heading ") else ""
                mark = "#" * int(level) + " " if level.isdigit() else "- " if style.startswith("List") else ""
                parts.append(mark + part.text)
        return "\n\n".join(parts)

    yield from _converted(path, "a DOCX", convert)


def read_conll(path: Path) -> Rows:
    """Sentences of `token ... tag` lines, a blank line apart: {text, tokens, tags}, by the first line's number."""
    for number, row in read_paragraphs(path):
        if isinstance(row, Broken):
            yield number, row
            continue
        words = [line.split() for line in row["text"].split("\n")]
        words = [w for w in words if w and w[0] != "-DOCSTART-"]
        if words:
            tokens = [w[0] for w in words]
            yield number, {"text": " ".join(tokens), "tokens": tokens, "tags": [w[-1] for w in words]}


def _text(path: Path) -> str | Broken:
    pieces: list[str] = []
    size = 0
    with opened(path) as file:
        for line in lines(path, file):
            if isinstance(line, Broken):
                return line
            pieces.append(line)
            size += len(line)
            if size > LARGEST_DOCUMENT:
                raise DataError("is too large for one row", where=str(path), fix="Read it by lines: format: txt.")
    text = "".join(pieces)
    return Broken("not_utf8", "is not UTF-8", shown(text[:10_000])) if not_utf8(text) else text


def _converted(path: Path, kind: str, convert: Callable[[], str]) -> Iterator[tuple[int, Any]]:
    try:
        text = convert().strip()
    except ImportError as error:
        raise MachineError(
            f"needs the package '{error.name}' to be read",
            where=str(path),
            fix="Install it: pip install 'tunesmith[documents]'",
        ) from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # a damaged document fails in as many ways as its format has parts
        yield 1, Broken("broken_document", f"is not {kind}, or damaged ({first_line(error)})", path.name)
        return
    text = text.encode("utf-8", "replace").decode()  # a PDF's own fonts may name half characters
    if text:
        yield 1, {"text": text}
    else:
        yield 1, Broken("no_text", f"is {kind} without text, such as a scan", path.name)


def _unpacked(path: Path) -> Path:
    if path.suffix.lower() in PACKED:
        raise DataError("is a packed document", where=str(path), fix="Unpack it first.")
    return path


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if sum(part.file_size for part in archive.infolist()) > LARGEST_DOCUMENT:
            raise DataError(
                f"unpacks to more than {LARGEST_DOCUMENT // 2**20} MiB", where=str(path), fix="Check the file."
            )
