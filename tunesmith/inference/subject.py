"""What evaluation asks: something that answers conversations, here or behind an endpoint. Its answers can be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from tunesmith.conversation.message import Conversation, Message, Text
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.errors import ModelError
from tunesmith.inference.engine import Engine, Sampling, Score, Tick
from tunesmith.runs import append_jsonl, hash_json, read_jsonl

BATCH = 128  # rows asked at once: what a kill can lose at most


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
        rendered = [self.rendered(row) for row in rows]
        for part in longest_first([len(r) for r in rendered]):
            yield from zip(part, self.engine.score([rendered[i] for i in part], tick), strict=True)

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


def longest_first(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices in batches of rows of about the same length, so that a full memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), BATCH):
        yield order[start : start + BATCH]


class Kept:
    """A subject whose answers are written down as they come, and which is only opened for what is not there yet.

    Args:
        path: of its file; its name must change with anything that could change an answer.
        opened: gives the subject.
        length: about how many tokens a text has.
        scores: whether the subject gives likelihoods.
    """

    def __init__(
        self, path: Path, name: str, opened: Callable[[], Subject], length: Callable[[str], int], scores: bool = True
    ) -> None:
        self._path, self._opened = path, opened
        self.name, self.length, self.scores = name, length, scores
        self._subject: Subject | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = {row["key"]: row for row in read_jsonl(path) if "key" in row}

    @property
    def subject(self) -> Subject:
        if self._subject is None:
            self._subject = self._opened()
        return self._subject

    def close(self) -> None:
        """Give the model's memory back."""
        self._subject = None

    def replies(
        self,
        prompts: Sequence[Ask],
        limit: int,
        tick: Tick,
        sampling: Sampling | None = None,
    ) -> list[Reply]:
        """The answers in the prompts' order. Equal prompts are asked once; what failed earlier is asked again."""
        drawn = asdict(sampling) if sampling else None
        keys = [hash_json(["answer", prompt.told(), limit, drawn]) for prompt in prompts]

        def asked(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for place, reply in self.subject.answers([prompts[i] for i in missing], limit, sampling, tick):
                yield missing[place], asdict(reply)

        return [Reply(**found) for found in self._all(keys, asked, tick)]

    def alone(self, prompts: Sequence[Ask], limit: int, tick: Tick) -> list[Reply]:
        """Answers to prompts asked one at a time, each with the seconds it took."""
        import time

        keys = [hash_json(["alone", prompt.told(), limit]) for prompt in prompts]

        def asked(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, i in enumerate(missing):
                for again in range(2 if number == 0 else 1):  # the first only warms up
                    started = time.perf_counter()
                    ((_, reply),) = self.subject.answers([prompts[i]], limit, None, tick if not again else _silent)
                    seconds = time.perf_counter() - started
                yield i, asdict(reply) | {"seconds": reply.seconds if reply.seconds is not None else seconds}

        return [Reply(**found) for found in self._all(keys, asked, tick)]

    def likelihoods(self, rows: Sequence[Row], tick: Tick) -> list[Score]:
        """Each row's likelihood, in the rows' order."""
        keys = [hash_json(["likelihood", _told(row)]) for row in rows]

        def asked(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for place, score in self.subject.likelihoods([rows[i] for i in missing], tick):
                yield missing[place], asdict(score)

        return [Score(**found) for found in self._all(keys, asked, tick)]

    def likeliest(self, rows: Sequence[Row], at: Sequence[Any] | None, k: int, tick: Tick) -> list[Any]:
        """As `Local.likeliest`, with lists in place of arrays; six decimals are kept."""
        asked_at = [None] * len(rows) if at is None else list(at)
        keys = [hash_json(["likeliest", _told(row), a, k]) for row, a in zip(rows, asked_at, strict=True)]

        def asked(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for i in missing:
                places = None if at is None else [at[i]]
                ((ids, values),) = self._local.likeliest([rows[i]], places, k, tick)
                yield i, {"ids": ids.tolist(), "values": values.round(6).tolist()}

        return [(found["ids"], found["values"]) for found in self._all(keys, asked, tick)]

    def recited(self, rows: Sequence[Conversation], shortest: int, length: int, tick: Tick) -> list[bool | None]:
        """As `Local.recited`."""
        keys = [hash_json(["recited", _told(row), shortest, length]) for row in rows]

        def asked(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for place, told in enumerate(self._local.recited([rows[i] for i in missing], shortest, length, tick)):
                yield missing[place], {"recited": told}

        return [found["recited"] for found in self._all(keys, asked, tick)]

    @property
    def _local(self) -> Local:
        if not isinstance(self.subject, Local):
            raise ModelError("gives no likelihoods", where=self.name, fix="Ask this of a model on this machine.")
        return self.subject

    def _all(
        self, keys: list[str], asked: Callable[[list[int]], Iterator[tuple[int, dict[str, Any]]]], tick: Tick
    ) -> list[dict[str, Any]]:
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        missing = [i for i in sorted(first.values()) if keys[i] not in self._known]
        tick(len(keys) - len(missing))
        for i, found in asked(missing) if missing else ():
            row = {"key": keys[i], "found": found}
            if not found.get("failure"):
                append_jsonl(self._path, row)
            self._known[keys[i]] = row
        answers = [self._known[key]["found"] for key in keys]
        for key in [k for k in first if self._known[k]["found"].get("failure")]:
            del self._known[key]  # a later call asks again
        return answers


def _told(row: Row) -> Any:
    if isinstance(row, Continuation):
        return [row.context, row.text]
    return {key: value for key, value in row.as_dict().items() if key not in ("id", "metadata")}


def _silent(by: float) -> None:
    pass
