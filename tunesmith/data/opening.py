"""A source's file -> its bytes and lines: unpacked, decoded, and bounded in memory whatever it holds."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tunesmith.errors import DataError

Row = dict[str, Any]
PACKED = (".gz", ".zst")
SPAN = 4 * 2**20  # bytes of a file of lines that one process reads
LONGEST_LINE = 16 * 2**20  # characters; a longer line is no row that any model could read
SHOWN = 2000  # characters of a line that is too long, to find it by
HALVES = re.compile("[\udc80-\udcff]")  # a byte that is not UTF-8, as it is decoded
UNPACKED_AT_LEAST, UNPACKED_RATIO = 2**30, 250  # beyond both, a packed file is taken for a bomb


@dataclass(frozen=True)
class Broken:
    """A row that can't be read: a reason code, what is wrong, and the text as it stands in the file."""

    reason: str
    why: str
    text: str


Rows = Iterator[tuple[int, Row | Broken]]


def unbroken(rows: Rows, path: Path) -> Iterator[tuple[int, Row]]:
    """A file's rows, for where none may be missing.

    Raises:
        DataError: one can't be read; says which.
    """
    for number, row in rows:
        if isinstance(row, Broken):
            raise DataError(row.why, where=f"{path}:{number}", fix="Mend the row, or take it out.")
        yield number, row


def endings(path: Path) -> list[str]:
    """A file's endings without dots and without those of packing: `rows.csv.gz` has csv."""
    return [s.lstrip(".").lower() for s in path.suffixes if s.lower() not in PACKED]


class _Watched(io.RawIOBase):
    """A packed file's content, refused where it grows beyond anything that a text packs to."""

    def __init__(self, path: Path, inner: Any) -> None:
        self._path, self._inner, self._read = path, inner, 0
        self._most = max(UNPACKED_AT_LEAST, UNPACKED_RATIO * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._inner.read(len(buffer))
        buffer[: len(piece)] = piece
        self._read += len(piece)
        if self._read > self._most:
            raise DataError(
                f"unpacks to more than {self._most // 2**20:,} MiB, {UNPACKED_RATIO} times what it takes up: "
                "it may be made to fill this machine",
                where=str(self._path),
                fix="Unpack it yourself if you trust it, and name the unpacked file.",
            )
        return len(piece)


@dataclass(frozen=True)
class Span:
    """Whole lines of a file: bytes from `start` to `end`, of which the first is line `first`.

    Attributes:
        lines: how many line ends are in it.
        state: the file's, when it was cut; it must be the same once it was read.
    """

    start: int
    end: int
    first: int
    lines: int
    state: tuple[int, int, int]


class _Part(io.RawIOBase):
    """The bytes of a span."""

    def __init__(self, file: BinaryIO, span: Span) -> None:
        self._file, self._left = file, span.end - span.start
        file.seek(span.start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read(min(len(buffer), self._left))
        buffer[: len(piece)] = piece
        self._left -= len(piece)
        return len(piece)


def state_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def spans(path: Path) -> list[Span]:
    """A file of lines, cut at line ends into spans of a few megabytes; none of one that is packed or UTF-16."""
    state = state_of(path)
    with path.open("rb") as file:
        if path.suffix.lower() in PACKED or file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            return []
        file.seek(0)
        found: list[Span] = []
        start, end, first, lines, halved = 0, 0, 1, 0, False
        while block := file.read(SPAN):
            if not block.endswith(b"\n"):  # up to a line feed, which ends a line however lines end
                block += file.readline(SPAN)
            # a carriage return alone ends a line too
            lines += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
            lines -= halved and block.startswith(b"\n")
            halved = block.endswith(b"\r")
            end += len(block)
            if block.endswith(b"\n"):
                found.append(Span(start, end, first, lines, state))
                start, first, lines = end, first + lines, 0
        if end > start:
            found.append(Span(start, end, first, lines, state))
    return found


@contextmanager
def opened(path: Path, span: Span | None = None) -> Iterator[BinaryIO]:
    """A file's content, unpacked by its ending; or a span of it.

    Raises:
        DataError: it is cut short, damaged, or unpacks to more than a text can.
    """
    try:
        with path.open("rb") as file:
            ending = path.suffix.lower()
            if ending == ".gz":
                yield io.BufferedReader(_Watched(path, gzip.GzipFile(fileobj=file)))
            elif ending == ".zst":
                import pyarrow as pa

                unpacked = pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
                yield io.BufferedReader(_Watched(path, unpacked))
            elif span is not None:
                yield io.BufferedReader(_Part(cast(BinaryIO, file), span))
            else:
                yield cast(BinaryIO, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _damaged(path, error) from error  # pyarrow's, of a packed stream


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"can't be unpacked ({error})",
        where=str(path),
        fix="The file is cut short or damaged; fetch it again.",
    )


def lines(path: Path, file: BinaryIO, beginning: bool = True) -> Iterator[str | Broken]:
    """Lines of a UTF-8 file (UTF-16 where its byte-order mark says so), with their ends. Only the beginning of a file
    has such a mark.

    A byte that is not UTF-8 becomes a lone surrogate, for the row to be found out. A line beyond LONGEST_LINE
    comes out as Broken with its beginning; the rest of it is passed over, never held.

    Raises:
        DataError: the file announces UTF-16 and is not.
    """
    start = file.peek(2)[:2] if isinstance(file, io.BufferedReader) else b""
    encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    encoding = encoding if beginning else "utf-8"
    errors = "strict" if encoding == "utf-16" else "surrogateescape"
    text = io.TextIOWrapper(file, encoding=encoding, errors=errors, newline="")
    try:
        while line := text.readline(LONGEST_LINE):
            if len(line) < LONGEST_LINE:
                yield line
                continue
            length, opening = len(line), line[:SHOWN]
            while line and not line.endswith(("\n", "\r")):
                line = text.readline(LONGEST_LINE)
                length += len(line)
            why = f"is a line of {length:,} characters; {LONGEST_LINE:,} can be read"
            yield Broken("too_long", why, shown(opening) + " ...")
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-16 ({error})", where=str(path), fix="Save the file as UTF-8.") from error


def not_utf8(text: str) -> bool:
    return not text.isascii() and HALVES.search(text) is not None


def shown(text: str) -> str:
    """A text as it can be printed: a byte that is not UTF-8 as its code."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
