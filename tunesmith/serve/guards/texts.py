"""Guards that look for something in a text."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.errors import DataError
from tunesmith.serve.guards.guard import Finding, TextGuard

WHERE = "serve.guards"
SENTENCES = re.compile(r"(?<=[.!?])\s+|\n+")  # judged one by one: kind words around an insult would outweigh it


class Blocklist(TextGuard):
    """Words and patterns that must not be said."""

    kind: Literal["blocklist"] = "blocklist"
    words: tuple[str, ...] = ()
    """Words and phrases, whole, whatever their case."""
    patterns: tuple[str, ...] = ()
    """Regular expressions (Python's)."""
    file: str | None = None
    """A file with a word or phrase a line."""

    quick: ClassVar[bool] = True

    @field_validator("patterns")
    @classmethod
    def _compiles(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression ({error})") from None
        return value

    @model_validator(mode="after")
    def _something(self) -> Blocklist:
        if not (self.words or self.patterns or self.file):
            raise ValueError("blocklist needs words, patterns or a file")
        return self

    @cached_property
    def _listed(self) -> list[str]:
        words = list(self.words)
        if self.file:
            try:
                lines = Path(self.file).read_text(encoding="utf-8").splitlines()
            except OSError as error:
                raise DataError(f"can't be read ({error.strerror})", where=f"{WHERE}: {self.file}") from error
            words += [line.strip() for line in lines if line.strip()]
        return words

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts = [rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(self._listed, key=len, reverse=True)]
        return re.compile("|".join([*parts, *(f"(?:{p})" for p in self.patterns)]), re.IGNORECASE)

    @property
    def reach(self) -> int:
        """Its longest phrase with what follows it, if that is more."""
        return max(self.span, *(len(word) + 2 for word in self._listed), 0)

    def find(self, text: str) -> list[Finding]:
        return [
            Finding("blocklist", m.start(), m.end(), "[REMOVED]") for m in self._pattern.finditer(text) if m.group()
        ]


class PersonalData(TextGuard):
    """Personal data, found as `data.clean.personal` finds it."""

    kind: Literal["personal"] = "personal"
    kinds: tuple[str, ...] = ()
    """What to look for, as presidio names it; `all` is everything. If not given, what is somebody's own."""
    names: str = "none"
    """The model of people's names, as in data.clean.personal. Looking for names takes milliseconds a text."""
    countries: tuple[str, ...] = ("us", "uk")
    """Whose national numbers are known."""
    threshold: float = Field(0.4, ge=0, le=1)
    """How sure a recogniser must be."""

    def find(self, text: str) -> list[Finding]:
        from tunesmith.screen.personal import finder, personal

        found = personal(finder(self.names, self.countries), text, self.threshold, self.kinds)
        return [Finding(f"personal:{f.kind}", f.start, f.end, f"[{f.kind}]") for f in found]


class SecretKeys(TextGuard):
    """API keys, tokens and passwords, found as `data.clean.secrets` finds them."""

    kind: Literal["secrets"] = "secrets"
    span: ClassVar[int] = 400

    def find(self, text: str) -> list[Finding]:
        from tunesmith.screen.secrets import secret_cuts

        return [Finding("secrets", *cut) for cut in secret_cuts(text)]


class Toxicity(TextGuard):
    """Foul language and insults, by a classifier: each sentence, and the text as a whole."""

    kind: Literal["toxicity"] = "toxicity"
    whole: ClassVar[bool] = True
    above: float = Field(0.9, gt=0, lt=1)
    """How probable it must be."""
    model: str | None = None
    """A text classifier: a folder or a hub name. If not given, alt-profanity-check's (English)."""
    labels: tuple[str, ...] = ()
    """The classifier's labels that count."""

    @field_validator("labels", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def find(self, text: str) -> list[Finding]:
        from tunesmith.screen.offence import offence

        parts = [part for part in {text: None} | dict.fromkeys(SENTENCES.split(text)) if part.strip()]
        if not parts or max(offence(parts, self.model, self.labels, f"{WHERE}.toxicity")) <= self.above:
            return []
        return [Finding("toxicity", 0, len(text), "[REMOVED]")]
