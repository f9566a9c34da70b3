"""What evaluation asks: something that answers conversations, here or behind an endpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tunesmith.conversation.message import Conversation, Message, Text
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.errors import ModelError
from tunesmith.inference.engine import Engine, Sampling, Score, Tick

BATCH = 256  # rows asked at once: what a kill can lose at most

EMBEDDED = 512  # tokens of a text that is embedded


@dataclass(frozen=True)
class Reply:
    """An answer: its text and length in tokens; how long it took, where it was asked alone; why there is none; how
    many tokens were read for it, where an endpoint counts them."""

    text: str
    tokens: int = 0
    seconds: float | None = None
    failure: str | None = None
    read: int = 0


@dataclass(frozen=True)
class Ask:
    """Messages that are to be answered, and what the assistant may call."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, row: Conversation) -> Ask:
        """What a row asks: all before its last answer."""
        return cls(row.prompt, row.tools)

    @classmethod
    def user(cls, text: str, system: str | None = None) -> Ask:
        opening = (Message("system", system),) if system is not None else ()
        return cls((*opening, Message("user", text)))

    def told(self) -> list[Any]:
        return [[m.for_template() for m in self.messages], *([list(self.tools)] if self.tools else [])]


@dataclass(frozen=True)
class Continuation:
    """Plain text, and how it goes on: what is scored without a chat template."""

    context: str
    text: str


Row = Conversation | Continuation


class Subject(Protocol):
    """What can be evaluated. Results come in any order, each with the index of what was asked."""

    name: str

    def answers(
        self, prompts: Sequence[Ask], limit: int, sampling: Sampling | None, tick: Tick
    ) -> Iterator[tuple[int, Reply]]:
        """Answers of at most `limit` tokens; greedy without `sampling`."""

    def likelihoods(self, rows: Sequence[Row], tick: Tick) -> Iterator[tuple[int, Score]]:
        """How likely each conversation's last answer, or each continuation, is."""


class Local:
    """A model on this machine."""

    def __init__(self, name: str, engine: Engine, renderer: Renderer) -> None:
        self.name, self.engine, self.renderer = name, engine, renderer

    def answers(
        self, prompts: Sequence[Ask], limit: int, sampling: Sampling | None, tick: Tick
    ) -> Iterator[tuple[int, Reply]]:
        ids = [self.renderer.prompt(p.messages, p.tools) for p in prompts]
        for part in longest_first([len(i) for i in ids]):
            # What is drawn for a prompt follows from the seed and the prompt, not from its neighbours.
            given = self.engine.generate([ids[i] for i in part], limit, self.renderer.stop_ids, tick, sampling)
            for i, answer in zip(part, given, strict=True):
                yield i, Reply(self.renderer.decode(answer), len(answer))

    def likelihoods(self, rows: Sequence[Row], tick: Tick) -> Iterator[tuple[int, Score]]:
        from tunesmith.models.packs import by_prompt

        rendered = [self.rendered(row) for row in rows]
        for part in longest_first([len(r) for r in rendered], by_prompt(rendered, math.inf)):
            yield from zip(part, self.engine.score([rendered[i] for i in part], tick), strict=True)

    def embedded(self, texts: Sequence[str], tick: Tick) -> Any:
        """Plain texts' embeddings, numpy [n, D], of their first EMBEDDED tokens."""
        ids = [(self._encoded(text) or self._beginning())[:EMBEDDED] for text in texts]
        return self.engine.embed(ids, tick)

    def likeliest(self, rows: Sequence[Row], at: Sequence[Any] | None, k: int, tick: Tick) -> list[Any]:
        """At each token of each row's last answer: ids and log-probabilities of the k likeliest, or of those `at`."""
        return self.engine.likeliest([self.rendered(row) for row in rows], at, k, tick)

    def recited(self, rows: Sequence[Conversation], shortest: int, length: int, tick: Tick) -> list[bool | None]:
        """Whether the model goes on with each answer word for word, given its first half; None for answers of fewer
        than `shortest` tokens. At most `length` tokens are compared."""
        heads: list[list[int]] = []
        tails: list[list[int] | None] = []
        for row in rows:
            rendered = self.renderer.render(row, only_last=True)
            start = next((i for i, weight in enumerate(rendered.weights) if weight), len(rendered))
            answer = [token for token in rendered.ids[start:] if token not in self.renderer.stop_ids]
            half = len(answer) // 2
            heads.append(rendered.ids[:start] + answer[:half])
            tails.append(answer[half : half + length] if len(answer) >= shortest else None)
        kept = [i for i, tail in enumerate(tails) if tail is not None]
        tick(len(rows) - len(kept))
        found: list[bool | None] = [None] * len(rows)
        for part in longest_first([len(heads[i]) for i in kept]):
            places = [kept[i] for i in part]
            given = self.engine.generate([heads[i] for i in places], length, self.renderer.stop_ids, tick)
            for i, ids in zip(places, given, strict=True):
                tail = tails[i] or []
                found[i] = ids[: len(tail)] == tail
        return found

    def rendered(self, row: Row) -> Rendered:
        """A row's tokens, its last answer's (or its continuation's) with weight."""
        if isinstance(row, Text):
            return self.renderer.render_text(row)
        if isinstance(row, Conversation):
            return self.renderer.render(row, only_last=True)
        # As lm-evaluation-harness cuts it: spaces between belong to the continuation, and both are tokenised together.
        kept = row.context.rstrip()
        before = self._encoded(kept) or self._beginning()
        whole = self._encoded(row.context + row.text) if kept else [*before, *self._encoded(row.text)]
        return Rendered(whole, [0.0] * len(before) + [1.0] * (len(whole) - len(before)))

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.renderer.tokenizer(text)["input_ids"] if text else []
        return ids

    def _beginning(self) -> list[int]:
        tokenizer = self.renderer.tokenizer
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ModelError("has no token to begin a text with", where=self.name, fix="Score text after a context.")
        return [first]


def longest_first(lengths: Sequence[int], together: Sequence[Sequence[int]] | None = None) -> Iterator[list[int]]:
    """Indices in batches of rows of about the same length, so that a full memory shows at once; those of rows that
    belong together follow one another."""
    groups = together or [[i] for i in range(len(lengths))]
    order = [i for group in sorted(groups, key=lambda g: (-max(lengths[i] for i in g), g[0])) for i in group]
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]
