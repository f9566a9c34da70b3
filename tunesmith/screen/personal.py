"""Personal data in a text: presidio's recognisers for what has a pattern, some of our own, and names by a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError, first_line
from tunesmith.screen.library import need

STEP = "data.clean.personal"
# What is found but is nobody's own: only looked for where it is named.
NOT_PERSONAL = frozenset({"DATE_TIME", "ORGANIZATION", "LOCATION", "NRP", "URL", "UUID", "AGE"})
CONTEXT_GAIN = 0.45
BEFORE, AFTER = 60, 30
# What models call things -> how presidio names them.
NAMES = {
    "PER": "PERSON",
    "PERSON": "PERSON",
    "LOC": "LOCATION",
    "GPE": "LOCATION",
    "LOCATION": "LOCATION",
    "ORG": "ORGANIZATION",
    "ORGANIZATION": "ORGANIZATION",
    "NORP": "NRP",
    "DATE": "DATE_TIME",
    "TIME": "DATE_TIME",
}
# Words for a street that stand behind its name, with the number before (10 Downing Street) ...
STREET = "street|str|st|avenue|ave|road|rd|lane|ln|dr|boulevard|blvd|ct|terrace|parkway|highway"
PLACE = "place|way|crescent|drive|court|square|close"  # words for much else: only behind a name
# ... or with the number on either side (Villacher Strasse 89), ones that names end in (Kerkstraat 12), and ones before
# the name (Via Roma 131, 36 rue de Pologne).
STRASSE = r"strasse|straße|gasse|weg|platz|allee|vei|väg|utca|út|útja|u\.|tér|körút|põik"
STRAAT = (
    "strasse|straße|gasse|weg|platz|allee|straat|laan|plein|gracht|vej|gade|vägen|gatan|gata|veien|vegen|katu|stræti"
    "|braut|vegur|tér"
)
RUE = (
    "rue|avenida|avda|calle|carrer|plaza|paseo|viale|vicolo|piazza|piazzetta|strada|rua|travessa|ulica|ul|chemin|allée"
    "|impasse|quai|(?-i:Via|Largo|Corso|Place|Avenue|Boulevard)"
)
OF = "(?: (?:de|da|do|du|des|dei|della|la|le|les|los))*"
SMALL = "the|a|an|in|on|of|at|to|and|or|per|each|every|down|along|across|for|from|by|with"
WORD = rf"(?!(?-i:{SMALL})\b)(?:[\w'’-]+|\w{{1,3}}\.) "
NAME = r"(?-i:[^\W\d_a-z])[\w.'’()-]*"  # a word that begins as a name does
UNIT = r"(?:Suite|Apt\.?|Unit|P\.?O\.? Box|PSC) \d{1,5}(?:,? Box \d{1,5})?"
GAP = r"[,\s>]+"  # within an address, that may be quoted as in an e-mail
# What may follow a street and its number: flats; then a postal code and a town, or towns, regions and countries up to
# a postal code.
REST = (
    rf"(?:{GAP}{UNIT}){{0,2}}"
    rf"(?:{GAP}(?:[A-Z]{{1,2}}-)?\d{{3,5}}(?:[ -]\d{{2,3}}| ?(?-i:[A-Z]{{2}}))? {NAME}(?: {NAME}){{0,2}}"
    rf"|(?:{GAP}(?:{NAME}|am|an|de[lr]?|di|do|la|nad|na|of|the|u|upon)){{1,7}}"
    rf"{GAP}(?!(?:19|20)\d\d\b)\d{{4,6}}(?:[ -]\d{{2,4}})?\b)?"
)
PHONES = ("phone", "telephone", "tel", "mobile", "cell", "fax", "office", "call", "desk", "message", "answering")
PLACES = ("address", "live", "located", "suite", "apt", "office", "restaurant", "meet", "return to", "ship", "deliver")
# Kind, pattern, score, words near it that raise the score. A score below 0.4 needs such a word.
PATTERNS: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    # As people write them: a country's code or an area's, groups of digits, an extension.
    (
        "PHONE_NUMBER",
        r"(?<![\w+.-])(?:\+|00)\d{1,3}[ .-]?(?:\(0\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}(?:x\d{1,5})?(?!\w)",
        0.6,
        (),
    ),
    ("PHONE_NUMBER", r"(?<![\w.-])\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?: ?x\d{1,5})?(?![\w-]|\.\d)", 0.5, ()),
    (
        "PHONE_NUMBER",
        r"(?<![\w+.-])(?:\(\d{1,5}\)[ .-]?\d{2,7}|\d{2,5}[ .-]\d{2,7})(?:[ .-]?\d{2,4}){0,3}(?: ?x\d{1,5})?(?!\w|\.\d)",
        0.3,
        (*PHONES, "number", "registered"),
    ),
    ("PHONE_NUMBER", r"(?<![\w.-])\d{7,13}(?!\w|\.\d)", 0.1, PHONES),
    ("CREDIT_CARD", r"(?<![\w-])\d(?:[ -]?\d){11,18}(?![\w-])", 0.1, ("card", "cc", "visa", "mastercard", "amex")),
    ("IBAN_CODE", r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?\b", 0.1, ("iban", "transfer")),
    ("US_DRIVER_LICENSE", r"\b[A-Z]?\d(?:[ -]?\d){5,14}\b", 0.1, ("driver's license", "driver’s license", "driving")),
    ("AGE", r"\b\d{1,3}(?=[ -](?:years?[ -]old|y/?o\b|years of age))", 0.6, ()),
    ("AGE", r"\b\d{1,3}\b", 0.1, ("turned", "turn", "the age of", "aged")),
    ("ZIP_CODE", r"\b\d{3,6}(?:[ -]\d{2,4})?\b|(?-i:\b\d{4} ?[A-Z]{2}\b)", 0.1, ("zip", "postcode", "postal code")),
    # As in Canada and Britain, and behind a state of the USA.
    ("ZIP_CODE", r"(?-i:\b[ABCEGHJ-NPR-TVXY]\d[A-Z] \d[A-Z]\d\b)", 0.5, ()),
    ("ZIP_CODE", r"(?-i:\b[A-Z]{1,2}\d[A-Z\d]? \d[ABD-HJLNP-UW-Z]{2}\b)", 0.5, ()),
    ("ZIP_CODE", r"(?<=(?-i:, [A-Z]{2} ))\d{5}(?:-\d{4})?\b", 0.5, ()),
    ("STREET_ADDRESS", rf"\b\d{{1,5}}[a-z]?[ ,]+(?:{WORD}){{1,3}}(?:{STREET})\b\.?(?: \d{{1,5}}\b)?{REST}", 0.5, ()),
    ("STREET_ADDRESS", rf"\b\d{{1,5}}[a-z]?[ ,]+(?:{NAME} ){{1,3}}(?:{PLACE}|{STRASSE})(?!\w){REST}", 0.5, ()),
    ("STREET_ADDRESS", rf"\b(?:{NAME} ){{1,3}}(?:{STRASSE}) \d{{1,5}}\b{REST}", 0.5, ()),
    ("STREET_ADDRESS", rf"\b(?:\d{{1,5}} )?\w+(?:{STRAAT}) \d{{1,5}}\b{REST}", 0.5, ()),
    ("STREET_ADDRESS", rf"\b(?:\d{{1,5}} )?(?:{RUE})\.? (?:{WORD}){{1,4}}?\d{{1,5}}\b{REST}", 0.5, ()),
    (
        "STREET_ADDRESS",
        rf"\b\d{{1,5}}(?: bis| ter)?,? (?:{RUE}|avenue|boulevard)\.?{OF} [\w'’-]+(?: {NAME}){{0,2}}{REST}",
        0.5,
        (),
    ),
    ("STREET_ADDRESS", rf"\b{UNIT}", 0.5, ()),
    (
        "STREET_ADDRESS",
        rf"\bcorner of (?:\d{{1,5}} )?(?:{NAME} )(?:[\w.'’-]+ ){{0,4}}?and {NAME}(?: {NAME}){{0,2}}",
        0.5,
        (),
    ),
    # A post office of the armed forces of the USA, and the line before it.
    (
        "STREET_ADDRESS",
        rf"(?:(?:{UNIT}|US[A-Z]{{1,3}} {NAME}){GAP})?\b[ADF]PO,? A[AEP] \d{{5}}(?:-\d{{4}})?\b",
        0.5,
        (),
    ),
    # As most of Europe writes them, the number behind: before a flat's, or near a word such as "address".
    ("STREET_ADDRESS", rf"\b(?:\d{{1,5}} )?(?:{NAME} ){{1,4}}\d{{1,5}}\.?(?={GAP}(?:Suite|Apt)\b){REST}", 0.5, ()),
    ("STREET_ADDRESS", rf"\b\d{{3,5}} {NAME} (?:{WORD}){{0,4}}\d{{1,4}}\b{REST}", 0.3, PLACES),
)


@dataclass(frozen=True)
class Found:
    """Characters `start` to `end` of a text hold personal data of a kind."""

    kind: str
    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Finder:
    """What looks for personal data: recognisers that know a pattern, and a model of names (None: there is none)."""

    recognisers: Sequence[Any]
    names: Any | None

    def find(self, text: str, threshold: float, kinds: frozenset[str] | None = None) -> list[Found]:
        """What a text holds, from its beginning. Where findings overlap, a pattern is surer than a model of names, and
        the higher score than the lower; a part of a number is never surer than the whole."""
        by_pattern = [
            Found(r.entity_type, r.start, r.end, _in_context(text, r.start, r.end, r.score, recogniser.context or ()))
            for recogniser in self.recognisers
            for r in recogniser.analyze(text, recogniser.supported_entities, None)
        ]
        kept: list[Found] = []
        for group in (by_pattern, self.names(text) if self.names is not None else []):
            found = [f for f in group if f.score >= threshold and (kinds is None or f.kind in kinds)]
            for one in sorted(found, key=lambda f: (-f.score, f.start - f.end, f.start)):
                around = [f for f in found if f.kind == one.kind and f.start <= one.start and one.end <= f.end]
                whole = max(around, key=lambda f: f.end - f.start)
                if all(whole.end <= k.start or k.end <= whole.start for k in kept):
                    kept.append(whole)
        return sorted(kept, key=lambda f: f.start)


def _in_context(text: str, start: int, end: int, score: float, context: Sequence[str]) -> float:
    """The score, raised where a word that belongs to the kind stands near (as presidio's context enhancer does, but on
    words as they are, which needs no language model)."""
    if score >= 1 or not context:
        return score
    near = f"{text[max(start - BEFORE, 0) : start]} \x00 {text[end : end + AFTER]}".casefold()
    if any(re.search(rf"\b{re.escape(word.strip().casefold())}", near) for word in context):
        return min(score + CONTEXT_GAIN, 1.0)
    return score


def personal(finder: Finder, text: str, threshold: float, kinds: Sequence[str]) -> list[Found]:
    """What a text holds of these kinds (`all`: of any); if none are given, of those that are somebody's own."""
    found = finder.find(text, threshold, frozenset(kinds) - {"all"} or None)
    return found if kinds else [f for f in found if f.kind not in NOT_PERSONAL]


@cache
def finder(names: str, countries: tuple[str, ...]) -> Finder:
    """The finder for these countries' numbers, and names as `data.clean.personal.names` says."""
    return Finder(_recognisers(countries), _names(names))


def _recognisers(countries: tuple[str, ...]) -> list[Any]:
    presidio = need("presidio_analyzer", STEP)
    predefined = need("presidio_analyzer.predefined_recognizers", STEP)
    generic = ("CreditCard", "Crypto", "Email", "Iban", "Ip", "MacAddress", "Url", "Date", "Uuid")
    found = [getattr(predefined, f"{name}Recognizer")() for name in generic]
    for name in predefined.__all__:
        kind = getattr(predefined, name)
        country = getattr(kind, "COUNTRY_CODE", None)
        if country in countries and issubclass(kind, presidio.PatternRecognizer):
            found.append(kind())
    regions = tuple(code.upper().replace("UK", "GB") for code in countries)
    found.append(predefined.PhoneRecognizer(supported_regions=regions, leniency=1))
    found.append(_card(presidio))
    for number, (kind, pattern, score, context) in enumerate(PATTERNS):
        found.append(
            presidio.PatternRecognizer(
                supported_entity=kind,
                name=f"tunesmith_{kind.lower()}_{number}",
                patterns=[presidio.Pattern(kind.lower(), pattern, score)],
                context=list(context),
            )
        )
    return found


def _card(presidio: Any) -> Any:
    """Card numbers of 12 to 19 digits that begin as an issuer's do and whose check digit (Luhn) is right: presidio's
    own recogniser knows those of 13 to 16."""

    class Card(presidio.PatternRecognizer):
        def validate_result(self, pattern_text: str) -> bool:
            digits = [int(c) for c in pattern_text if c.isdigit()]
            doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(reversed(digits))]
            return sum(doubled) % 10 == 0

    issuers = r"(?<![\w-])(?:4|5[0-8]|6[0-9]|2[2-7]|3[0-9]|1800|2131)\d(?:[ -]?\d){9,17}(?![\w-])"
    return Card(
        supported_entity="CREDIT_CARD",
        name="tunesmith_card",
        patterns=[presidio.Pattern("card", issuers, 0.3)],
        context=["card", "cc", "visa", "mastercard", "maestro", "amex"],
    )


def installed_model() -> str | None:
    """The spaCy pipeline to take names from: of those installed, the most accurate by its name's ending."""
    spacy = need("spacy", STEP)
    sizes = ("_trf", "_lg", "_md", "_sm")
    rank = {m: next((i for i, s in enumerate(sizes) if s in m), len(sizes)) for m in spacy.util.get_installed_models()}
    return min(rank, key=lambda m: (rank[m], not m.startswith("en"), m)) if rank else None


def _names(names: str) -> Any | None:
    if names == "none":
        return None
    spacy = need("spacy", STEP)
    model = installed_model() if names == "auto" else names
    if model is None:
        return None
    if model in spacy.util.get_installed_models() or (Path(model) / "meta.json").is_file():
        pipeline = spacy.load(model, disable=["parser", "lemmatizer", "attribute_ruler"])

        def by_spacy(text: str) -> list[Found]:
            return [
                Found(NAMES[e.label_], e.start_char, e.end_char, 0.85)
                for e in pipeline(text).ents
                if e.label_ in NAMES and e.text.strip()
            ]

        return by_spacy
    return _by_transformers(model)


def _by_transformers(model: str) -> Any:
    from transformers import pipeline

    try:
        tagger = pipeline("token-classification", model=model, aggregation_strategy="simple", device="cpu")
    except (OSError, ValueError) as error:
        raise MachineError(
            f"no model of names is called '{model}' ({first_line(error)})",
            where=f"{STEP}.names",
            fix="Name an installed spaCy pipeline (python -m spacy download en_core_web_lg), a folder or a hub model "
            "for token classification, or none.",
        ) from error

    def by_transformers(text: str) -> list[Found]:
        return [
            Found(NAMES[e["entity_group"]], int(e["start"]), int(e["end"]), float(e["score"]))
            for e in tagger(text)
            if e["entity_group"] in NAMES
        ]

    return by_transformers
