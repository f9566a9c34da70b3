"""`data.clean.boilerplate`: lines that many answers share, and phrases by which a model speaks of itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import Field, PrivateAttr

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import Around, Step, Verdict
from tunesmith.data.clean.texts import SIDES, map_texts, texts
from tunesmith.data.groups import digest

FEWEST_WORDS = 4
FEWEST_ROWS = 5
PHRASES = (
    "as an ai language model",
    "as a large language model",
    "as an ai assistant",
    "i'm just an ai",
    "my knowledge cutoff",
    "my training data only goes",
    "openai's content policy",
    "regenerate response",
)


class Boilerplate(Step):
    """Take lines that open or end many texts (greetings, signatures, disclaimers) out of them, and leave out rows whose
    answer holds a phrase by which another model speaks of itself. A text that is nothing else keeps its line."""

    on: Literal["prompt", "answer", "both"] = "answer"
    """Whose texts lose such lines. A prompt's may be a template that the model needs: look before taking them out."""
    share: float = Field(0.2, gt=0, le=1)
    """How large a share of the rows (and at least five) must share a line of four words or more."""
    phrases: tuple[str, ...] = PHRASES
    """Phrases that make a row go, whatever their case."""
    _lines: dict[int, Counter[str]] = PrivateAttr(default_factory=dict)  # of the rows that `tell` is asked of next

    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterator[Verdict | None]:
        common = self._lines[id(rows)] = self._common(rows)
        spoken = re.compile("|".join(map(re.escape, self.phrases)) or r"(?!)", re.IGNORECASE)
        for row in rows:
            phrase = next((m.group() for text in texts(row, ("assistant",)) if (m := spoken.search(text))), None)
            if phrase is not None:
                yield Verdict(None, f"the answer says '{phrase}'", {phrase.lower(): 1})
                continue
            freed = map_texts(row, lambda text: _without(text, common), SIDES[self.on])
            yield None if freed is row else Verdict(freed, "shared lines taken out", {"lines": 1})

    def tell(self, rows: Sequence[Conversation], removed: Iterable[tuple[str, str]]) -> dict[str, Any]:
        common = self._lines.pop(id(rows), Counter())
        return {"shared lines": [{"line": line[:200], "rows": n} for line, n in common.most_common(20)]}

    def _common(self, rows: Sequence[Conversation]) -> Counter[str]:
        fewest = max(FEWEST_ROWS, self.share * len(rows))

        def lines() -> Iterator[str]:
            return (line for row in rows for line in {e for t in texts(row, SIDES[self.on]) for e in _ends(t)})

        # Counted by their hashes first: most lines are there once, and are not to be remembered.
        hashes = np.fromiter((int.from_bytes(digest(line)[:8], "little") for line in lines()), dtype=np.uint64)
        seen, counts = np.unique(hashes, return_counts=True)
        often = set(seen[counts >= fewest].tolist())
        if not often:
            return Counter()
        counted = Counter(line for line in lines() if int.from_bytes(digest(line)[:8], "little") in often)
        return Counter({line: n for line, n in counted.items() if n >= fewest})


def _ends(text: str) -> set[str]:
    """The first and the last line of a text of several, where they are long enough to be no word of chance."""
    lines = [line.strip() for line in text.strip().split("\n")]
    return {line for line in (lines[0], lines[-1]) if len(line.split()) >= FEWEST_WORDS} if len(lines) > 1 else set()


def _without(text: str, common: Counter[str]) -> str:
    lines = text.strip().split("\n")
    first, last = 0, len(lines)
    while last - first > 1 and lines[first].strip() in common:
        first += 1
    while last - first > 1 and lines[last - 1].strip() in common:
        last -= 1
    return text if last - first == len(lines) else "\n".join(lines[first:last]).strip()
