"""Rows that a model makes: other words for a question, or new rows like those that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from tunesmith.conversation.message import Conversation, Message
from tunesmith.data.augment.base import Account, Making, Means, Seen, drawn, plain
from tunesmith.errors import MachineError
from tunesmith.inference.section import PriceSection

REFUSALS = re.compile(r"^(i'm sorry|i am sorry|i can't|i cannot|as an ai|sorry, )", re.IGNORECASE)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
REPHRASE = (
    "Say the following message in other words, as another person would. Keep its language, its meaning and every name "
    "and number. Answer with the new message alone."
)


class Asked(Making):
    """Rows from a model: the recipe's base model, or one behind an OpenAI-compatible endpoint."""

    url: str | None = None
    """Where the endpoint is, before /chat/completions; the run's own base model if not given."""
    model: str | None = None
    """The endpoint's name of the model. Its key is OPENAI_API_KEY, if that is set."""
    temperature: float = Field(0.8, ge=0, le=2)
    """How freely the endpoint answers. The base model answers greedily."""
    max_tokens: int = Field(512, ge=1)
    """Longest answer."""
    too_alike: float = Field(0.9, gt=0, le=1)
    """Leave out what is at least so similar to a row that is there: Jaccard similarity of runs of three words."""
    price: PriceSection = PriceSection()
    """For the cost in the manifest."""

    @model_validator(mode="after")
    def _named(self) -> Asked:
        if (self.url is None) != (self.model is None):
            raise ValueError("`url` and `model` go together")
        return self

    def answers(self, prompts: Sequence[Sequence[Message]], means: Means, account: Account) -> list[str]:
        account.asked += len(prompts)
        if self.url is None:
            if means.answers is None:
                raise MachineError(
                    "there is no model to ask here", where="data.augment", fix="Name an endpoint: url and model."
                )
            return means.answers(prompts, self.max_tokens)
        from tunesmith.data.augment.endpoint import ask

        texts = ask(f"{self.url}#{self.model}", prompts, self.max_tokens, (self.temperature, means.seed), account)
        account.cost = self.price.cost(account.tokens["prompt"], account.tokens["completion"])
        return texts

    def provenance(self, kind: str, sources: Sequence[str]) -> dict[str, Any]:
        model = f"{self.url}#{self.model}" if self.url else "the base model"
        return {"made": {"by": kind, "from": list(sources), "model": model}}


class Paraphrase(Asked):
    """A share of the rows again, the user's last message in other words; the answer is the same."""

    made_of: ClassVar[tuple[str, ...]] = ("conversation", "preference", "rated")

    kind: Literal["paraphrase"] = "paraphrase"
    share: float = Field(0.1, gt=0, le=1)
    """Of the training rows, drawn by the seed."""
    per_row: int = Field(1, ge=1, le=20)
    """Ways of saying it."""

    def make(self, rows: Sequence[Conversation], means: Means, account: Account) -> Iterator[Conversation]:
        asking = [row for row in rows if any(m.role == "user" for m in row.prompt) and not row.media]
        chosen = [row for row in drawn(asking, self.share, means.seed, self.kind) for _ in range(self.per_row)]
        prompts = []
        for i, row in enumerate(chosen):
            way = f" This is version {i % self.per_row + 1}." if self.per_row > 1 else ""
            prompts.append([Message("system", REPHRASE + way), Message("user", _asked(row))])
        seen = Seen(_asked(row) for row in asking)
        for i, (row, text) in enumerate(zip(chosen, self.answers(prompts, means, account), strict=True)):
            text = text.strip().strip('"').strip()
            wrong = _unfit(_asked(row), text, seen, self.too_alike)
            if wrong:
                account.filtered[wrong] += 1
                continue
            seen.add(text)
            last = max(j for j, m in enumerate(row.prompt) if m.role == "user")
            messages = tuple(replace(m, content=text) if j == last else m for j, m in enumerate(row.messages))
            name = f"{row.id}~paraphrase{i % self.per_row + 1}"
            yield replace(row, messages=messages, id=name, metadata=row.metadata | self.provenance(self.kind, [row.id]))


class Synthesise(Asked):
    """New questions and answers, made after examples drawn from the training rows, a JSON schema, or both."""

    made_of: ClassVar[tuple[str, ...]] = ("conversation",)

    kind: Literal["synthesise"] = "synthesise"
    rows: int = Field(100, ge=1)
    """How many to ask for."""
    examples: int = Field(4, ge=0, le=50)
    """Training rows shown with each request. 0 shows none: `about` and `answers_like` then say what a row is."""
    about: str = ""
    """What the rows are about, in a sentence, and what else they should keep to."""
    answers_like: dict[str, Any] | None = None
    """A JSON schema that answers must meet."""

    @model_validator(mode="after")
    def _told(self) -> Synthesise:
        if not (self.examples or (self.about and self.answers_like)):
            raise ValueError("without examples, `about` and `answers_like` must say what a row is")
        return self

    def make(self, rows: Sequence[Conversation], means: Means, account: Account) -> Iterator[Conversation]:
        pairs = [row for row in rows if row.question and row.answer] if self.examples else []
        random = np.random.default_rng([means.seed, len(pairs), self.rows])
        answers = {row.answer for row in pairs}
        labels = answers if 0 < 2 * len(answers) <= len(pairs) and all(len(a) <= 80 for a in answers) else None
        shown = [
            [pairs[i] for i in random.choice(len(pairs), min(self.examples, len(pairs)), replace=False)]
            for _ in range(self.rows)
        ]
        prompts = [[Message("user", self._request(examples, labels, n))] for n, examples in enumerate(shown, 1)]
        seen = Seen(row.question for row in rows)
        for n, (examples, text) in enumerate(zip(shown, self.answers(prompts, means, account), strict=True), 1):
            pair = _pair(text)
            if pair is None:
                account.filtered["no row"] += 1
                continue
            wrong = _unfit(None, pair[0], seen, self.too_alike) or self._wrong_answer(pair[1], labels)
            if wrong:
                account.filtered[wrong] += 1
                continue
            seen.add(pair[0])
            kin = examples or [rows[0]]
            system = [m for m in kin[0].messages[:1] if m.role == "system"]
            yield Conversation(
                (*system, Message("user", pair[0]), Message("assistant", pair[1])),
                f"synthesised:{n}",
                _marks(kin) | self.provenance(self.kind, [e.id for e in examples]),
            )

    def _request(self, examples: Sequence[Conversation], labels: set[str] | None, number: int) -> str:
        lines = [json.dumps({"question": e.question, "answer": e.answer}, ensure_ascii=False) for e in examples]
        rules = [f"About: {self.about}"] if self.about else []
        rules += [f"The answer is one of: {', '.join(sorted(labels))}."] if labels else []
        rules += [f"The answer meets this JSON schema: {json.dumps(self.answers_like)}"] if self.answers_like else []
        opening, wanted = "A row of a data set is a JSON object: question and answer.", "Write one new row."
        if lines:
            opening = "Here are rows of a data set, a JSON object each:"
            wanted = "Write one new row of the same kind, unlike these in what it asks."
        return "\n".join([opening, *lines, *rules, f"{wanted} Row {number}. Answer with its JSON object alone."])

    def _wrong_answer(self, answer: str, labels: set[str] | None) -> str:
        if not answer.strip():
            return "empty"
        if labels is not None and answer not in labels:
            return "unknown label"
        if self.answers_like is not None:
            try:
                import jsonschema
            except ImportError as error:
                raise MachineError(
                    "answers_like needs the package 'jsonschema'",
                    where="data.augment",
                    fix="Install it: pip install 'tunesmith[augment]'",
                ) from error
            try:
                jsonschema.validate(json.loads(answer), self.answers_like)
            except (ValueError, jsonschema.ValidationError):
                return "not of the schema"
        return "refusal" if REFUSALS.match(answer) and labels is None else ""


def _marks(kin: Sequence[Conversation]) -> dict[str, Any]:
    """The tag that all these rows have, so that a made row is mixed as they are."""
    tags = {row.metadata.get("tag") for row in kin}
    tag = tags.pop() if len(tags) == 1 else kin[0].metadata.get("tag")
    return {"tag": tag} if tag is not None else {}


def _asked(row: Conversation) -> str:
    return next(m.content for m in reversed(row.prompt) if m.role == "user")


def _pair(text: str) -> tuple[str, str] | None:
    """The question and answer of a reply: its first JSON object."""
    start, end = text.find("{"), text.rfind("}")
    try:
        row = json.loads(text[start : end + 1])
        question, answer = row["question"], row["answer"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(question, str):
        return None
    return question, answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False)


def _unfit(original: str | None, text: str, seen: Seen, too_alike: float) -> str:
    """Why a text is not taken; empty if it is."""
    if not text.strip():
        return "empty"
    if REFUSALS.match(text):
        return "refusal"
    if original is not None:
        if plain(text) == plain(original):
            return "unchanged"
        if not len(original) / 3 <= len(text) <= 3 * len(original) + 40:
            return "length"
        if sorted(NUMBER.findall(text)) != sorted(NUMBER.findall(original)):
            return "numbers"
    return "alike" if seen.like(text) >= too_alike else ""
