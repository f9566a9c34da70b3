"""The data stage, run on some sources and looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.data.prepare import load_rows
from tunesmith.runs import read_jsonl

PARTS = ("train", "validation", "test")


class Prepared:
    """What the data stage made of some sources."""

    def __init__(self, folder: Path, told: dict[str, Any]) -> None:
        self.told, self.counts = told, told["counts"]
        self.parts = {part: load_rows(folder / f"{part}.jsonl") for part in PARTS}
        self.rejected, self.removed = (read_jsonl(folder / f"{n}.jsonl") for n in ("rejected", "removed"))
        every = sum(map(len, self.parts.values()))
        made = sum(self.counts.get("made", {}).values())
        assert self.counts["read"] + made == every + len(self.rejected) + len(self.removed)
        assert self.counts["accepted"] == every and self.counts["rejected"] == len(self.rejected)
        assert sum(self.counts["removed"].values()) == len(self.removed)
        assert all(row["row"] and row["why"] for row in self.rejected + self.removed)

    def turns(self, part: str = "train") -> list[list[tuple[str, str]]]:
        return [[(m.role, m.content) for m in row.messages] for row in self.parts[part]]
