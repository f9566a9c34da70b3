"""`data.clean.length` and `data.clean.repetition`: texts of an odd length, and texts that repeat themselves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import Around, RowStep, Step, Verdict
from tunesmith.data.clean.texts import text_of, texts
from tunesmith.data.shelf import in_chunks

FEWEST = 20
MAD = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
SIDES: tuple[Literal["prompt", "answer"], ...] = ("prompt", "answer")


class Length(Step):
    """Leave out rows whose prompt or answer is too short, too long, or far from the others' length."""

    short: ClassVar[str] = "outliers"

    shortest: int = Field(1, ge=0)
    """Fewest characters of prompt and of answer."""
    longest: int | None = Field(None, ge=1)
    """Most characters of prompt and of answer."""
    outliers: float | None = Field(6.0, gt=0)
    """How many standard deviations from the median a length may lie, on a logarithmic scale (the deviation is estimated
    from the median absolute deviation, which outliers don't move). Sets of fewer than 20 rows have none."""
    action: Literal["drop", "report"] = "drop"
    """Leave such rows out, or list them for a person."""

    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterator[Verdict | None]:
        measured = np.concatenate(list(around.engine.map(_lengths, in_chunks(rows), len(rows))))
        usual = [_middle(lengths) for lengths in measured.T]
        for i, lengths in enumerate(measured.tolist()):
            told = (self._odd(*one, len(rows)) for one in zip(SIDES, lengths, usual, strict=True))
            why, kind = next((one for one in told if one), ("", ""))
            yield Verdict(None if self.action == "drop" else rows[i], why, {kind: 1}) if why else None

    def _odd(self, side: str, n: int, usual: tuple[float, float], rows: int) -> tuple[str, str] | None:
        """What is odd about a side of `n` characters, and what that is called."""
        middle, spread = usual
        away = (math.log(n + 1) - middle) / spread if spread else 0.0
        if n < self.shortest:
            return f"the {side} has {n} characters, the fewest allowed are {self.shortest}", f"{side} too short"
        if self.longest is not None and n > self.longest:
            return f"the {side} has {n} characters, the most allowed are {self.longest}", f"{side} too long"
        if self.outliers is not None and rows >= FEWEST and abs(away) > self.outliers:
            return f"the {side} has {n} characters, {abs(away):.1f} deviations from the median", f"{side} outlier"
        return None


def _lengths(rows: Sequence[Conversation]) -> np.ndarray:
    """Characters of each row's sides, shape [rows, sides]."""
    return np.array([[len(text_of(row, side)) for side in SIDES] for row in rows], dtype=np.int64)


def _middle(lengths: np.ndarray) -> tuple[float, float]:
    """Median and robust standard deviation of the lengths' logarithms; the deviation is 0 where half of them are the
    same."""
    values = np.log(lengths + 1.0)
    middle = float(np.median(values))
    return middle, MAD * float(np.median(np.abs(values - middle)))


class Repetition(RowStep):
    """Leave out rows with a text that says one thing over and over, by three of the shares that Gopher's data was
    filtered by (Rae et al. 2021, table A1). Texts of fewer than 20 words are not judged."""

    lines: float = Field(0.3, gt=0, le=1)
    """Largest share of characters in lines that stood before."""
    runs: float = Field(0.15, gt=0, le=1)
    """Largest share of characters in runs of five words that stood before."""
    pair: float = Field(0.2, gt=0, le=1)
    """Largest share of characters in the most frequent pair of words."""
    action: Literal["drop", "report"] = "drop"
    """Leave such rows out, or list them for a person."""

    def look(self, row: Conversation) -> Verdict:
        for text in texts(row, ("user", "assistant")):
            words = text.split()
            if len(words) < FEWEST:
                continue
            shares = {"lines": repeated_lines(text), "runs": repeated_runs(words, 5), "pair": top_pair(words)}
            for name, share in shares.items():
                if share > getattr(self, name):
                    why = f"repeats itself ({share:.0%} of a text, by {name})"
                    return Verdict(None if self.action == "drop" else row, why, {name: 1})
        return Verdict(row)


def repeated_lines(text: str) -> float:
    """Share of characters in lines that stood before."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    once = sum(map(len, set(lines)))
    return 1 - once / sum(map(len, lines)) if lines else 0.0


def repeated_runs(words: Sequence[str], length: int) -> float:
    """Share of characters in words of a run that stood before; no word counts twice."""
    seen: set[tuple[str, ...]] = set()
    again: set[int] = set()
    for i in range(len(words) - length + 1):
        run = tuple(words[i : i + length])
        if run in seen:
            again.update(range(i, i + length))
        seen.add(run)
    return sum(len(words[i]) for i in again) / max(sum(map(len, words)), 1)


def top_pair(words: Sequence[str]) -> float:
    """Share of characters in the most frequent pair of words; 0 where none occurs twice."""
    pairs = Counter(pairwise(words))
    (one, other), times = max(pairs.items(), key=lambda p: p[1])
    return times * (len(one) + len(other)) / max(sum(map(len, words)), 1) if times > 1 else 0.0
