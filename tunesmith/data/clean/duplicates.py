"""`data.clean.duplicates`: of rows that say the same, one is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from heapq import nsmallest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean import near
from tunesmith.data.clean.step import Around, Step, Verdict
from tunesmith.data.clean.texts import media_of, text_of
from tunesmith.data.groups import same

SAME = "says the same as "
PARTLY = "compared with some only"


class Duplicates(Step):
    """Of rows that say the same, keep one. `near` compares runs of words by Jaccard similarity (MinHash finds the
    pairs to compare), `exact` the words alone, `semantic` what an embedding model makes of them."""

    short: ClassVar[str] = "kind"

    kind: Literal["exact", "near", "semantic"] = "exact"
    """exact: the same words, whatever the case, spacing and punctuation; near: alike in runs of words; semantic:
    alike in meaning to an embedding model."""
    threshold: float | None = Field(None, gt=0, le=1)
    """How alike: Jaccard similarity for near (0.8 if not given), cosine for semantic (0.95)."""
    on: Literal["prompt", "answer", "both"] = "both"
    """What is compared."""
    keep: Literal["first", "longest"] = "first"
    """Which row of a group stays."""
    words: int = Field(3, ge=1)
    """near: how many words make a run. Fewer finds looser likeness."""
    model: str | None = None
    """semantic: the embedding model, a folder or a hub name."""

    @model_validator(mode="after")
    def _named(self) -> Duplicates:
        if (self.kind == "semantic") != (self.model is not None):
            raise ValueError("kind semantic needs `model`, and only that kind does")
        return self

    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterator[Verdict | None]:
        leaders, lengths, partly = self._groups(rows, around)
        for i, kept in enumerate(_kept(leaders, lengths, self.keep == "longest").tolist()):
            if i != kept:
                yield Verdict(None, f"{SAME}{rows[kept].id}", {self.kind: 1})
            else:
                yield Verdict(rows[i], "", {PARTLY: 1}) if partly[i] else None

    def _groups(self, rows: Sequence[Conversation], around: Around) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For each row the first of its group, how long its text is, and whether it was compared with some only of
        those that it might be like."""
        if self.kind == "semantic":
            from tunesmith.data.clean.embedding import joined

            texts, media = zip(*((text_of(row, self.on), media_of(row)) for row in rows), strict=True)
            groups = joined(texts, media, self.model or "", self.threshold or 0.95)
            return groups.leaders(), np.array([len(text) for text in texts]), np.zeros(len(texts), dtype=bool)
        if self.kind == "exact":
            keys = near.keys_of(rows, near.Exact(self.on), around.engine)
            leaders = same(np.concatenate([k.digests for k in keys]))
            return leaders, np.concatenate([k.lengths for k in keys]), np.zeros(len(leaders), dtype=bool)
        with TemporaryDirectory(dir=around.scratch) as name:
            folder, threshold = Path(name), self.threshold or 0.8
            keys = near.keys_of(rows, near.Sketch(self.on, self.words, threshold, folder), around.engine)
            leaders, partly = near.nearly_same(keys, threshold, folder, around.engine)
        return leaders, np.concatenate([k.lengths for k in keys]), partly

    def tell(self, rows: Sequence[Conversation], removed: Iterable[tuple[str, str]]) -> dict[str, Any]:
        counted: Counter[str] = Counter()
        first: dict[str, str] = {}
        for id, why in removed:
            kept = why.removeprefix(SAME)
            counted[kept] += 1
            first.setdefault(kept, id)
        largest = nsmallest(10, counted.items(), key=lambda g: (-g[1], g[0]))
        return {"groups": [{"kept": one, "removed": n, "such as": first[one]} for one, n in largest]}


def _kept(leaders: np.ndarray, lengths: np.ndarray, longest: bool) -> np.ndarray:
    """For each row the one of its group that stays: the first, or the first of the longest."""
    if not longest:
        return leaders
    order = np.lexsort((np.arange(len(leaders)), -lengths, leaders))
    ordered = leaders[order]
    starts = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    kept = np.empty(len(leaders), dtype=np.int64)
    kept[order] = order[np.maximum.accumulate(np.where(starts, np.arange(len(order)), 0))]
    return kept
