"""`data.clean.personal`: names, addresses, numbers and codes that belong to people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.pseudonyms import Pseudonyms
from tunesmith.data.clean.step import RowStep, Verdict
from tunesmith.data.clean.texts import map_all
from tunesmith.screen.inside import replaced
from tunesmith.screen.personal import Finder, finder, personal


class Personal(RowStep):
    """Find personal data by presidio's recognisers and some of our own, and names by a model where one is installed.
    Every text of a row is looked through, with what is thought and what tools are called with."""

    short: ClassVar[str] = "action"

    action: Literal["report", "mask", "pseudonymise", "drop"] = "report"
    """report: count, and list the rows; mask: write [KIND] in its place; pseudonymise: a made-up value, the same for
    the same value across a row; drop: leave the row out."""
    kinds: tuple[str, ...] = ()
    """What to look for, as presidio names it ([PERSON, PHONE_NUMBER]); `all` is everything. If not given, everything
    but dates, ages, organisations, places, nationalities, URLs and UUIDs."""
    names: str = "auto"
    """The model of names: an installed spaCy pipeline, a folder, or a hub model for token classification; auto: the
    best spaCy pipeline that is installed; none: no names are looked for."""
    countries: tuple[str, ...] = ("us", "uk")
    """Whose national numbers and phone numbers are known: country codes of presidio's recognisers."""
    threshold: float = Field(0.4, ge=0, le=1)
    """How sure a recogniser must be. Lower finds more, and more that is none."""
    locale: str = "en_US"
    """Where made-up values come from (Faker's locale)."""

    @field_validator("kinds", "countries", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def look(self, row: Conversation) -> Verdict:
        found: list[tuple[str, str]] = []

        def note(text: str) -> str:
            found.extend((f.kind, text[f.start : f.end]) for f in self._find(text))
            return text

        map_all(row, note)
        if not found:
            return Verdict(row)
        counted = dict(Counter(kind for kind, _ in found))
        why = "holds " + ", ".join(counted)
        if self.action == "report":
            return Verdict(row, why, counted)
        if self.action == "drop":
            return Verdict(None, why, counted)
        put: Callable[[str, str], str] = _masked
        if self.action == "pseudonymise":
            made = Pseudonyms(row.id, self.locale)
            made.learn(found)
            put = made
        return Verdict(map_all(row, lambda text: self._replaced(text, put)), why, counted)

    def hide(self, text: str) -> str:
        return text if self.action == "report" else self._replaced(text, _masked)

    @property
    def note(self) -> str:
        if self.finder.names is not None:
            return "Names of people were looked for by a model."
        why = "as the recipe says" if self.names == "none" else "no model of names is installed"
        return f"Names of people were not looked for: {why}."

    @property
    def finder(self) -> Finder:
        """What looks for personal data; made once a process."""
        return finder(self.names, self.countries)

    def _find(self, text: str) -> list[Any]:
        return personal(self.finder, text, self.threshold, self.kinds)

    def _replaced(self, text: str, put: Callable[[str, str], str]) -> str:
        return replaced(text, lambda t: [(f.start, f.end, put(f.kind, t[f.start : f.end])) for f in self._find(t)])


def _masked(kind: str, value: str) -> str:
    return f"[{kind}]"
