"""`data.clean.bias`: how often groups of people are named, with which words, and how they are labelled."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.step import RowStep, Verdict
from tunesmith.data.clean.texts import texts

GROUPS: dict[str, tuple[str, ...]] = {
    "women": (
        "woman",
        "women",
        "girl",
        "girls",
        "she",
        "her",
        "hers",
        "herself",
        "mother",
        "wife",
        "daughter",
        "female",
    ),
    "men": ("man", "men", "boy", "boys", "he", "him", "his", "himself", "father", "husband", "son", "male"),
    "old people": (
        "elderly",
        "old people",
        "old man",
        "old woman",
        "seniors",
        "senior citizens",
        "pensioner",
        "retiree",
    ),
    "young people": ("teenager", "teenagers", "youth", "young people", "young man", "young woman", "adolescent"),
    "Black people": ("african american", "african americans", "black people", "black man", "black woman", "african"),
    "white people": ("caucasian", "white people", "white man", "white woman", "european"),
    "Asian people": ("asian", "asians", "chinese", "indian", "japanese", "korean", "vietnamese"),
    "Hispanic people": ("hispanic", "hispanics", "latino", "latina", "latinx", "mexican", "mexicans"),
    "Muslims": ("muslim", "muslims", "islamic", "islam"),
    "Christians": ("christian", "christians", "catholic", "protestant"),
    "Jews": ("jew", "jews", "jewish"),
    "gay and trans people": ("gay", "lesbian", "bisexual", "transgender", "trans woman", "trans man", "queer", "lgbt"),
    "disabled people": ("disabled", "disability", "wheelchair", "blind", "deaf", "autistic"),
    "immigrants": ("immigrant", "immigrants", "refugee", "refugees", "migrant", "migrants", "foreigner", "foreigners"),
}
WINDOW = 5
WORDS_SHOWN = 12
LABELS_SHOWN = 20
FEWEST = 3
WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
STOP_WORDS = """
    a about above after again all also am an and any are as at be because been before being below between both but by
    can could did do does doing don down during each few for from further had has have having here how i if in into is
    it its just me more most my no nor not now of off on once one only or other our out over own s same should so some
    such t than that the their them then there these they this those through to too under until up very was we were
    what when where which while who whom why will with would you your
"""
STOP = frozenset(STOP_WORDS.split())


class Bias(RowStep):
    """Count how many rows name a group of people, which words stand near it more often than near other groups, and how
    its rows are labelled. Changes nothing; the figures are for the report."""

    groups: Mapping[str, tuple[str, ...]] = Field(default_factory=lambda: dict(GROUPS))
    """What groups are called: name to words. If not given, English words for 14 of them."""

    def look(self, row: Conversation) -> Verdict:
        text = "\n".join(texts(row, ("user", "assistant")))
        return Verdict(row, "", {name: 1 for name, pattern in self._patterns().items() if pattern.search(text)})

    def tell(self, rows: Sequence[Conversation], removed: Iterable[tuple[str, str]]) -> dict[str, Any]:
        patterns = self._patterns()
        near: dict[str, Counter[str]] = {name: Counter() for name in patterns}
        named: Counter[str] = Counter()
        answers: Counter[str] = Counter()
        answers_of: dict[str, Counter[str]] = {name: Counter() for name in patterns}
        for row in rows:
            labels = len(answers) <= LABELS_SHOWN
            if labels:
                answers[row.answer] += 1
            for name in self.look(row).found:
                named[name] += 1
                self._count_near(row, patterns[name], near[name])
                if labels:
                    answers_of[name][row.answer] += 1
        every: Counter[str] = sum(near.values(), Counter())
        total = sum(every.values()) or 1
        groups = []
        for name, words in near.items():
            own = sum(words.values()) or 1
            # How much more often than near all groups; smoothed, so that a word seen once says little.
            marked = {
                w: (n + 0.5) / (own + 1) / ((every[w] + 0.5) / (total + 1)) for w, n in words.items() if n >= FEWEST
            }
            top = sorted(marked, key=lambda w: (-marked[w] * words[w] ** 0.5, w))[:WORDS_SHOWN]
            if named[name]:
                share = f"{named[name] / len(rows):.1%}"
                shown = ", ".join(f"{w} ({words[w]})" for w in top)
                groups.append({"group": name, "rows": named[name], "share": share, "words near it": shown})
        return {
            "groups": sorted(groups, key=lambda g: -int(str(g["rows"]))),
            "label rates": self._rates(len(rows), answers, answers_of),
        }

    def _rates(self, rows: int, counts: Counter[str], counts_of: Mapping[str, Counter[str]]) -> list[dict[str, Any]]:
        """For labels: each group's share of each, where it is far from the share in all rows (z above 2)."""
        if len(counts) > LABELS_SHOWN or any(len(label) > 80 for label in counts) or len(counts) * 2 > rows:
            return []
        found = []
        for name in self.groups:
            of = counts_of[name]
            n = sum(of.values())
            for label in counts:
                expected = counts[label] / rows
                spread = (expected * (1 - expected) / n) ** 0.5 if n else 0.0
                z = (of[label] / n - expected) / spread if spread else 0.0
                if abs(z) > 2 and n >= FEWEST:
                    rates = {"share in group": f"{of[label] / n:.1%}", "share in all": f"{expected:.1%}"}
                    found.append({"group": name, "rows": n, "label": label, **rates, "z": round(z, 1)})
        return sorted(found, key=lambda f: -abs(f["z"]))

    def _count_near(self, row: Conversation, pattern: re.Pattern[str], counted: Counter[str]) -> None:
        """Count words within five of a group's name."""
        own = {w for words in self.groups.values() for phrase in words for w in phrase.casefold().split()}
        for text in texts(row, ("user", "assistant")):
            for match in pattern.finditer(text):
                before = WORD.findall(text[: match.start()][-80:])[-WINDOW:]
                after = WORD.findall(text[match.end() :][:80])[:WINDOW]
                counted.update(w for w in map(str.casefold, before + after) if w not in STOP and w not in own)

    def _patterns(self) -> dict[str, re.Pattern[str]]:
        return {
            name: re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b", re.IGNORECASE)
            for name, words in self.groups.items()
        }
