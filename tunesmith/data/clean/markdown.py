"""`data.clean.markdown`: code blocks and tables that were left broken."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tunesmith.data.clean.step import MendStep

FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})(.*)$")
CELLS = re.compile(r"(?<!\\)\|")
RULE = re.compile(r"\s*:?-+:?\s*")


class Markdown(MendStep):
    """Mend Markdown that shows wrongly: code blocks that are never closed, and tables (lines that begin and end with |)
    whose second line is missing or has another number of columns."""

    fences: bool = True
    """Close a code block that is open where its message ends."""
    tables: bool = True
    """Give a table the line below its head, with as many columns; nothing inside of code blocks."""

    def mend(self, text: str) -> str:
        """A text, mended."""
        if "```" not in text and "~~~" not in text and "|" not in text:
            return text
        out: list[str] = []
        table: list[str] = []
        fence = ""
        for line in text.split("\n"):
            if self.tables and not fence and _is_row(line):
                table.append(line)
                continue
            out += _table(table)
            table = []
            fence = _fence_after(line, fence)
            out.append(line)
        out += _table(table)
        if self.fences and fence:
            out = [*out[:-1], fence] if not out[-1].strip() else [*out, fence]
        return "\n".join(out)


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
