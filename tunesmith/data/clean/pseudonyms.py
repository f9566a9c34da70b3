"""Made-up values in the place of real ones: the same for the same value, throughout a row."""

from __future__ import annotations

import hashlib
import random
import string
from typing import Any

from tunesmith.data.clean.step import need

# Kind -> Faker's provider. Kinds that are not here keep their shape: digits for digits, letters for letters.
MADE_BY = {
    "EMAIL_ADDRESS": "ascii_safe_email",
    "IBAN_CODE": "iban",
    "CREDIT_CARD": "credit_card_number",
    "IP_ADDRESS": "ipv4_private",
    "MAC_ADDRESS": "mac_address",
    "STREET_ADDRESS": "street_address",
    "LOCATION": "city",
    "ORGANIZATION": "company",
    "URL": "url",
    "US_SSN": "ssn",
}


class Pseudonyms:
    """One row's values and what stands for them. A person named in full and then by a part of the name keeps the part
    of the made-up name; nothing is kept from row to row, so rows can't be joined by a pseudonym."""

    def __init__(self, row: str, locale: str) -> None:
        self._row = row
        self._faker = need("faker", "personal").Faker(locale)
        self._made: dict[tuple[str, str], str] = {}
        self._parts: dict[str, str] = {}

    def learn(self, values: list[tuple[str, str]]) -> None:
        """Make up what stands for these (kind, value); full names first, so that their parts are known."""
        for kind, value in sorted(set(values), key=lambda v: (-len(v[1].split()), v)):
            self._made[kind, value] = self._person(value) if kind == "PERSON" else self._other(kind, value)

    def __call__(self, kind: str, value: str) -> str:
        if (kind, value) not in self._made:  # found only once escapes were read
            self.learn([(kind, value)])
        return self._made[kind, value]

    def _seed(self, kind: str, value: str) -> int:
        text = f"{self._row}\0{kind}\0{value.casefold()}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])

    def _person(self, value: str) -> str:
        words = value.split()
        known = [self._parts.get(word.casefold()) for word in words]
        if all(known):
            return " ".join(k for k in known if k)
        self._faker.seed_instance(self._seed("PERSON", value))
        first, last = self._faker.first_name(), self._faker.last_name()
        made = [first] if len(words) == 1 else [first, *(self._faker.first_name() for _ in words[2:]), last]
        for word, name in zip(words, made, strict=True):
            self._parts.setdefault(word.casefold(), name)
        return " ".join(self._parts[word.casefold()] for word in words)

    def _other(self, kind: str, value: str) -> str:
        seed = self._seed(kind, value)
        if kind in MADE_BY:
            self._faker.seed_instance(seed)
            return str(getattr(self._faker, MADE_BY[kind])())
        draw = random.Random(seed)
        return "".join(_like(c, draw) for c in value)


def _like(character: str, draw: random.Random) -> Any:
    if character.isdigit():
        return draw.choice(string.digits)
    if character.isalpha():
        return draw.choice(string.ascii_uppercase if character.isupper() else string.ascii_lowercase)
    return character
