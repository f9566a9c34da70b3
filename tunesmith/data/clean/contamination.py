"""`data.clean.contamination`: training rows that a test would ask again are counted and removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean import minhash
from tunesmith.data.clean.step import Around, Step, Verdict
from tunesmith.data.clean.texts import text_of, texts
from tunesmith.data.readers import Broken
from tunesmith.data.section import SourceSection
from tunesmith.data.sources import matching, read_rows

HELD = ("test", "validation")


class Contamination(Step):
    """Count and remove training rows that share a run of words with a test row, or nearly are one. The run is of 13
    words, as in the GPT-3 paper (Brown et al. 2020, appendix C); a text with fewer is compared whole."""

    short: ClassVar[str] = "against"
    after_split: ClassVar[bool] = True

    against: tuple[str, ...] = ("test",)
    """`test` and `validation` of this recipe, and files of benchmarks (paths, relative to the recipe)."""
    words: int = Field(13, ge=3)
    """How long a shared run of words must be."""
    threshold: float = Field(0.8, gt=0, le=1)
    """How alike near-duplicates are: Jaccard similarity of runs of three words."""

    @field_validator("against", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def files(self, folder: Path) -> list[Path]:
        return [path for name in self.against if name not in HELD for path in matching(name, folder, KEY)]

    def apply(self, rows: Sequence[Conversation], around: Around) -> list[Verdict]:
        verdicts = [Verdict(row) for row in rows]
        prompts = [text_of(row, "prompt") for row in rows]
        whole = ["\n".join(texts(row, ("user", "assistant", "tool"))) for row in rows]
        for name, tests in self._tests(around).items():
            where = [id for id, _ in tests]
            asked = [text for _, text in tests]
            same = {minhash.normalised(text): id for id, text in reversed(tests)}
            runs = _first_with(minhash.shingles(asked, self.words))
            long = [minhash.shingles(side, self.words) for side in (whole, prompts)]
            near = minhash.near_pairs(minhash.shingles(prompts), minhash.shingles(asked), self.threshold)
            for i in range(len(rows)):
                if verdicts[i].row is None:
                    continue
                words = minhash.normalised(prompts[i])
                shared = [runs[run] for side in long for run in side[i].tolist() if run in runs]
                if words and words in same:
                    why = f"asks the same as {name} row {same[words]}"
                elif shared:
                    why = f"shares {self.words} words in a row with {name} row {where[min(shared)]}"
                elif i in near:
                    why = f"is nearly the same as {name} row {where[near[i]]}"
                else:
                    continue
                verdicts[i] = Verdict(None, why, {name: 1})
        return verdicts

    def _tests(self, around: Around) -> dict[str, list[tuple[str, str]]]:
        """What is tested, by name: (id, the question's text) of each row."""
        found = {}
        for name in self.against:
            if name in HELD:
                found[name] = [(row.id, text_of(row, "prompt")) for row in around.held.get(name, ())]
            else:
                found[name] = [t for path in matching(name, around.folder, KEY) for t in benchmark_texts(path)]
        return found


KEY = "data.clean.contamination"
SHORTEST = 3


def benchmark_texts(path: Path) -> list[tuple[str, str]]:
    """Every text in a benchmark's rows, whatever its columns are called: (file:row, text). Texts of one or two words,
    such as labels, are left out."""
    found = []
    for number, row in read_rows(SourceSection(path=str(path)), path):
        if not isinstance(row, Broken):
            found += [
                (f"{path.name}:{number}", text)
                for text in _strings(row)
                if len(minhash.normalised(text).split()) >= SHORTEST
            ]
    return found


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _first_with(sets: Sequence[np.ndarray]) -> dict[int, int]:
    """Which set holds a shingle first."""
    found: dict[int, int] = {}
    for i, one in enumerate(sets):
        for run in one.tolist():
            found.setdefault(run, i)
    return found
