"""`data.clean.language`: rows in other languages are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import RowStep, Verdict
from tunesmith.data.clean.texts import SIDES, texts

CERTAINTY = 0.8
SHORTEST = 20  # characters
CODE = re.compile(r"```.*?```|`[^`\n]*`|https?://\S+", re.DOTALL)


class Language(RowStep):
    """Leave out rows that are certainly in another language, by the model that py3langid ships. Short texts are too
    uncertain to judge and stay."""

    short: ClassVar[str] = "keep"

    keep: tuple[str, ...] = Field(min_length=1)
    """Languages to keep, by their ISO 639 codes: [en, de]."""
    on: Literal["prompt", "answer", "both"] = "both"
    """Whose texts are judged; the users' and the assistant's each on their own."""
    certainty: float = Field(CERTAINTY, gt=0, le=1)
    """How probable another language must be for a row to go."""
    shortest: int = Field(SHORTEST, ge=1)
    """Texts of fewer characters are not judged."""

    @field_validator("keep", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("keep")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for code in value:
            if not re.fullmatch(r"[a-z]{2,3}", code):
                raise ValueError(f"'{code}' is not a language's code of two or three letters, such as en")
        return value

    def look(self, row: Conversation) -> Verdict:
        spoken = list(languages(row, SIDES[self.on], self.certainty, self.shortest))
        other = [found for found in spoken if found[1] not in self.keep]
        why = "the {}'s text is in '{}' (p = {:.2f})".format(*other[-1]) if other else ""
        return Verdict(None if why else row, why, {language: 1 for _, language, _ in spoken} or {"not judged": 1})


def languages(
    row: Conversation, roles: Sequence[str], certainty: float = CERTAINTY, shortest: int = SHORTEST
) -> Iterator[tuple[str, str, float]]:
    """What a row's roles speak, each judged on its own: (role, language, its probability); nothing of a role whose
    text is too short or too uncertain."""
    for role in roles:
        text = CODE.sub(" ", "\n".join(texts(row, (role,)))).strip()
        if len(text) >= shortest:
            language, sure = detected(text)
            if sure >= certainty:
                yield role, language, sure


def detected(text: str) -> tuple[str, float]:
    """A text's most probable language and its probability."""
    language, probability = _identifier().classify(text)
    return str(language), float(probability)


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
