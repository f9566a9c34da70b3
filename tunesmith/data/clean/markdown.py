"""`data.clean.markdown`: code blocks, tables and lists that were left broken."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from tunesmith.data.clean.step import MendStep

FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$")
CELLS = re.compile(r"(?<!\\)\|")
RULE = re.compile(r"\s*:?-+:?\s*")
DOT = re.compile(r"^(\s*)[•●▪◦‣⁃∙][ \t]*(?=\S)")
ITEM = re.compile(r"(?P<indent> *)(?P<number>\d{0,3})(?P<mark>(?<=\d)[.)]|(?<!\d)[-*+])(?=\s*\S)")
TIGHT = re.compile(r"(?<![-*+])[^\W\d_]|[^\W\d_a-z][^*]*$")  # what follows a number; what follows another marker
BULLET = re.compile(r"( *)([-*]) +(?=\S)(?!(?:[-*] *){2,}$)")
EMPTY = re.compile(r" *(?:([-*+])|\d{1,9}([.)]))\s*")
ANY = re.compile(r"```|~~~|\||^\s*(?:[-*+•●▪◦‣⁃∙]|\d{1,9}[.)])", re.MULTILINE)


class Markdown(MendStep):
    """Mend Markdown that shows wrongly: code blocks that are never closed, tables (lines that begin and end with |)
    whose second line is missing or has another number of columns, and lists that are none."""

    fences: bool = True
    """Close a code block that is open where its message ends."""
    tables: bool = True
    """Give a table the line below its head, with as many columns; nothing inside of code blocks."""
    lists: bool = True
    """Begin a list's items as Markdown knows them: - for a dot such as •, one marker for - and * in one list, a space
    between a marker and what follows (where two lines in a row lack it and a capital, or after numbers in order a
    letter, follows); leave out an empty item at the end. Nothing inside of code blocks."""

    def mend(self, text: str) -> str:
        """A text, mended."""
        if not ANY.search(text):
            return text
        out: list[str] = []
        plain: list[str] = []
        fence = ""
        for line in text.split("\n"):
            before, fence = fence, _fence_after(line, fence)
            if not before and not fence:
                plain.append(line)
                continue
            out += self._plain(plain)
            plain = []
            out.append(line)
        out += self._plain(plain)
        if self.lists and not fence:
            out = _without_empty_end(out)
        if self.fences and fence:
            out = [*out[:-1], fence] if not out[-1].strip() else [*out, fence]
        return "\n".join(out)

    def _plain(self, lines: list[str]) -> list[str]:
        """Lines outside of code blocks, mended."""
        if self.tables:
            parts = ((is_row, list(part)) for is_row, part in groupby(lines, _is_row))
            lines = [line for is_row, part in parts for line in (_table(part) if is_row else part)]
        return _one_marker(_spaced(lines)) if self.lists else lines


def _spaced(lines: list[str]) -> list[str]:
    """Lines of lists with a marker that Markdown knows, and a space after it."""
    lines = [DOT.sub(r"\1- ", line, count=1) for line in lines]
    items = [None, *map(ITEM.match, lines), None]
    for i, (before, item, after) in enumerate(zip(items, items[1:], items[2:], strict=False)):
        if item and TIGHT.match(lines[i], item.end()) and (_follows(before, item) or _follows(item, after)):
            lines[i] = f"{item[0]} {lines[i][item.end() :]}"
    return lines


def _follows(one: re.Match[str] | None, other: re.Match[str] | None) -> bool:
    """Whether two lines begin as items of one list do, one after the other."""
    if one is None or other is None or one["indent"] != other["indent"]:
        return False
    numbered = bool(one["number"] and other["number"] and int(one["number"]) + 1 == int(other["number"]))
    return one["mark"] == other["mark"] and (numbered or one["number"] == other["number"] == "")


def _one_marker(lines: list[str]) -> list[str]:
    """Items of one list, which follow one another and are indented alike, with the first one's marker."""
    before = ""
    for i, line in enumerate(lines):
        item = BULLET.match(line)
        if item and before.startswith(item[1]) and len(before) == item.end(2):
            lines[i] = f"{before}{line[item.end(2) :]}"
        else:
            before = item[1] + item[2] if item else ""
    return lines


def _without_empty_end(lines: list[str]) -> list[str]:
    """Lines without an item at their end that says nothing, where the line before it is an item of the same list."""
    end = len(lines)
    while end > 1 and not lines[end - 1].strip():
        end -= 1
    empty = EMPTY.fullmatch(lines[end - 1])
    if end < 2 or not empty:
        return lines
    marker = re.escape(empty[1]) if empty[1] else rf"\d{{1,9}}{re.escape(empty[2])}"
    return lines[: end - 1] if re.match(rf" *{marker} +\S", lines[end - 2]) else lines


def _fence_after(line: str, fence: str) -> str:
    """The fence that is open after this line, or nothing, by CommonMark's rules; `fence` is the one before it."""
    found = FENCE.match(line)
    if not fence:
        return found[1] if found else ""
    closes = found and found[1].startswith(fence) and not found[2].strip()
    return "" if closes else fence


def _is_row(line: str) -> bool:
    line = line.strip()
    return len(line) > 1 and line.startswith("|") and line.endswith("|") and not line.endswith("\\|")


def _cells(line: str) -> list[str]:
    return CELLS.split(line.strip()[1:-1])


def _table(lines: list[str]) -> Iterator[str]:
    """A table's lines, the second of them mended."""
    if len(lines) < 2:
        yield from lines
        return
    columns, second = len(_cells(lines[0])), _cells(lines[1])
    ruled = all(RULE.fullmatch(cell) for cell in second)
    if ruled and len(second) == columns:
        yield from lines
        return
    kept = [cell.strip() for cell in second[:columns]] if ruled else []
    yield lines[0]
    yield f"| {' | '.join(kept + ['---'] * (columns - len(kept)))} |"
    yield from lines[2 if ruled else 1 :]
