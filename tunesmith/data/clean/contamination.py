"""`data.clean.contamination`: training rows that a test would ask again are counted and removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from tunesmith.conversation.message import Conversation
from tunesmith.data.alike import WORDS, common, own_words, some
from tunesmith.data.clean import minhash
from tunesmith.data.clean.benchmarks import benchmark_files
from tunesmith.data.clean.step import Around, Step, Verdict
from tunesmith.data.clean.texts import text_of, texts
from tunesmith.data.groups import digest
from tunesmith.data.opening import unbroken
from tunesmith.data.section import SourceSection
from tunesmith.data.shelf import in_chunks
from tunesmith.data.sources import read_rows

HELD = ("test", "validation")


class Contamination(Step):
    """Count and remove training rows that share a run of words with a test row, or nearly are one. The run is of 13
    words, as in the GPT-3 paper (Brown et al. 2020, appendix C); a text with fewer is compared whole. Words of a
    template, which a tenth of the rows or of the test have, don't count: they say nothing of any row."""

    short: ClassVar[str] = "against"
    after_split: ClassVar[bool] = True

    against: tuple[str, ...] = ("test",)
    """`test` and `validation` of this recipe, public benchmarks by name (gsm8k, arc, humaneval, mmlu, ...), and files
    of others (paths, relative to the recipe)."""
    folder: str | None = None
    """A folder of benchmarks' files by name, as gsm8k.jsonl, relative to the recipe. Looked at before the hub."""
    words: int = Field(13, ge=3)
    """How long a shared run of words must be."""
    threshold: float = Field(0.8, gt=0, le=1)
    """How alike near-duplicates are: Jaccard similarity of runs of three words."""

    @field_validator("against", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def files(self, folder: Path) -> list[Path]:
        return [path for name in self.against if name not in HELD for path in self._files(name, folder)]

    def _files(self, name: str, folder: Path) -> list[Path]:
        return benchmark_files(name, folder, self.folder, KEY)

    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterator[Verdict | None]:
        tests = self._tests(around)
        texts_of = [[text for _, text in told] for told in tests.values()]
        template = Template([[_whole(row) for row in some(rows)], *texts_of])
        sought = {name: Tested(told, self.words, self.threshold, template) for name, told in tests.items()}
        pieces = in_chunks(rows)
        found = around.engine.map(Seek(sought, template, self.words), pieces, len(rows))
        for piece, whys in zip(pieces, found, strict=True):
            for i in range(len(piece)):
                name, why = whys.get(i, ("", ""))
                yield Verdict(None, why, {name: 1}) if why else None

    def _tests(self, around: Around) -> dict[str, list[tuple[str, str]]]:
        """What is tested, by name: (id, the question's text) of each row."""
        found = {}
        for name in self.against:
            if name in HELD:
                found[name] = [(row.id, text_of(row, "prompt")) for row in around.held.get(name, ())]
            else:
                found[name] = [t for path in self._files(name, around.folder) for t in benchmark_texts(path)]
        return found


KEY = "data.clean.contamination"
SHORTEST = 3
PHRASE = 5  # words


def _whole(row: Conversation) -> str:
    return "\n".join(texts(row, ("user", "assistant", "tool")))


class Template:
    """What many rows or many tests share, since one template made them: it does not tell that a row is in a test."""

    def __init__(self, sets: Sequence[Sequence[str]]) -> None:
        """`sets` are the texts of the rows, and of each test."""
        self._phrases, self._runs = (
            np.unique(np.concatenate([common(one, words) for one in sets])) for words in (PHRASE, WORDS)
        )

    def runs(self, texts: Sequence[str]) -> list[minhash.Shingles]:
        """Each text's runs of three words, without the template's."""
        return minhash.shingles(texts, WORDS, self._runs)

    def long_runs(self, texts: Sequence[str], words: int) -> list[minhash.Shingles]:
        """Runs of so many of each text's own words; the whole text where it has fewer and is of no template."""
        own = own_words(texts, self._phrases, PHRASE)
        long = minhash.shingles(own, words)
        for i, text in enumerate(own):
            if len(long[i]) == 1 and text.count(" ") < words - 1 and text != minhash.normalised(texts[i]):
                long[i] = long[i][:0]
        return long


@dataclass(frozen=True)
class Seek:
    """Holds rows against tests. The result: of each row that one asks again the number, and (the test's name, why)."""

    sought: Mapping[str, Tested]
    template: Template
    words: int

    def __call__(self, rows: Sequence[Conversation]) -> dict[int, tuple[str, str]]:
        asked, whole = zip(*((text_of(row, "prompt"), _whole(row)) for row in rows), strict=True)
        long = [self.template.long_runs(side, self.words) for side in (whole, asked)]
        runs = self.template.runs(asked)
        found: dict[int, tuple[str, str]] = {}
        for name, tested in self.sought.items():
            near = tested.near.like(runs)
            for i, text in enumerate(asked):
                if i not in found:
                    why = tested.why(name, minhash.normalised(text), [side[i] for side in long], near.get(i))
                    found |= {i: (name, why)} if why else {}
        return found


def benchmark_texts(path: Path) -> list[tuple[str, str]]:
    """Every text in a benchmark's rows, whatever its columns are called: (file:row, text). Texts of one or two words,
    such as labels, are left out.

    Raises:
        DataError: a row can't be read.
    """
    return [
        (f"{path.name}:{number}", text)
        for number, row in unbroken(read_rows(SourceSection(path=str(path)), path), path)
        for text in _strings(row)
        if len(minhash.normalised(text).split()) >= SHORTEST
    ]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


class Tested:
    """What a test asks, to hold rows against."""

    def __init__(self, tests: Sequence[tuple[str, str]], words: int, threshold: float, template: Template) -> None:
        """Args:
        tests: (id, text) of each.
        words: how long a shared run must be.
        threshold: of near-duplicates.
        """
        asked = [text for _, text in tests]
        self.near = minhash.Index(template.runs(asked), threshold)
        self._words, self._ids = words, [id for id, _ in tests]
        self._same = {digest(minhash.normalised(text)): i for i, text in reversed(list(enumerate(asked)))}
        sets = template.long_runs(asked, words)
        runs = np.concatenate([np.empty(0, dtype=np.uint64), *sets])
        where = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
        self._runs, first = np.unique(runs, return_index=True)
        self._where = where[first]  # of the first test that has the run

    def why(self, name: str, words: str, sides: Sequence[np.ndarray], near: int | None) -> str:
        """Why a row whose prompt has these words, and these runs on its sides, is not to be trained on; or nothing."""
        if words and (same := self._same.get(digest(words))) is not None:
            return f"asks the same as {name} row {self._ids[same]}"
        shared = [found for side in sides if len(found := self._holding(side))]
        if shared:
            return f"shares {self._words} words in a row with {name} row {self._ids[min(int(s.min()) for s in shared)]}"
        return "" if near is None else f"is nearly the same as {name} row {self._ids[near]}"

    def _holding(self, runs: np.ndarray) -> np.ndarray:
        """Which tests hold one of these runs."""
        if not len(self._runs):
            return self._where
        at = np.minimum(np.searchsorted(self._runs, runs), len(self._runs) - 1)
        return self._where[at[self._runs[at] == runs]]
