"""`data.clean.duplicates`: of rows that say the same, one is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean import minhash
from tunesmith.data.clean.step import Around, Step, Verdict
from tunesmith.data.clean.texts import text_of


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

    def apply(self, rows: Sequence[Conversation], around: Around) -> list[Verdict]:
        texts = [text_of(row, self.on) for row in rows]
        verdicts = [Verdict(row) for row in rows]
        for group in self._groups(texts).members():
            kept = max(group, key=lambda i: len(texts[i])) if self.keep == "longest" else group[0]
            for i in group:
                if i != kept:
                    verdicts[i] = Verdict(None, f"says the same as {rows[kept].id}", {self.kind: 1})
        return verdicts

    def _groups(self, texts: Sequence[str]) -> minhash.Groups:
        if self.kind == "near":
            return minhash.joined(minhash.shingles(texts, self.words), self.threshold or 0.8)
        if self.kind == "semantic":
            from tunesmith.data.clean.embedding import joined

            return joined(texts, self.model or "", self.threshold or 0.95)
        groups = minhash.Groups(len(texts))
        first: dict[str, int] = {}
        for i, text in enumerate(texts):
            words = minhash.normalised(text)
            groups.join(i, first.setdefault(words or text, i))
        return groups

    def tell(self, rows: Sequence[Conversation], verdicts: Sequence[Verdict]) -> dict[str, Any]:
        kept: dict[str, list[str]] = {}
        for row, verdict in zip(rows, verdicts, strict=True):
            if verdict.row is None:
                kept.setdefault(verdict.why.removeprefix("says the same as "), []).append(row.id)
        largest = sorted(kept.items(), key=lambda g: (-len(g[1]), g[0]))[:10]
        return {"groups": [{"kept": one, "removed": len(others), "such as": others[0]} for one, others in largest]}
