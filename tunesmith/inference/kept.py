"""A subject's answers, written down as they come: what was asked once is not asked again."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.errors import ModelError
from tunesmith.inference.engine import Sampling, Score, Tick
from tunesmith.inference.subject import Ask, Continuation, Local, Reply, Row, Subject
from tunesmith.runs import append_jsonl, hash_json, read_jsonl

DEAD = 8  # failures of something that never answered: no reason to go on asking


class Kept:
    """A subject whose answers are written down as they come, and which is only opened for what is not there yet.

    Args:
        path: of its file; its name must change with anything that could change an answer.
        opened: gives the subject.
        length: about how many tokens a text has.
        scores: whether the subject gives likelihoods.
        origin: what it is, for a manifest.
    """

    def __init__(
        self,
        path: Path,
        name: str,
        opened: Callable[[], Subject],
        length: Callable[[str], int],
        scores: bool = True,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        self._path, self._opened = path, opened
        self.name, self.length, self.scores, self.origin = name, length, scores, dict(origin or {})
        self._subject: Subject | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = {row["key"]: row for row in read_jsonl(path) if "key" in row}
        self._answered = bool(self._known)
        self._failed: dict[str, str] = {}

    @property
    def failures(self) -> Counter[str]:
        """How many of all that was asked got no answer, by reason."""
        return Counter(self._failed.values())

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

    def embedded(self, texts: Sequence[str], tick: Tick) -> Any:
        """Texts' embeddings by this model, numpy [n, D] in half precision; None of what is no language model here."""
        keys = [hash_json(["embedded", text]) for text in texts]

        def asked(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            if not isinstance(self.subject, Local):
                yield from ((i, {"embedding": None}) for i in missing)
                return
            found = self.subject.embedded([texts[i] for i in missing], tick)
            for i, vector in zip(missing, found.astype(np.float16), strict=True):
                yield i, {"embedding": base64.b64encode(vector.tobytes()).decode()}

        bits = [found["embedding"] for found in self._all(keys, asked, tick)] if self.scores else []
        if not bits or None in bits:
            return None
        return np.stack([np.frombuffer(base64.b64decode(vector), np.float16) for vector in bits])

    def recited(self, rows: Sequence[Conversation], shortest: int, length: int, tick: Tick) -> list[bool | None]:
        """As `Local.recited`."""
        keys = [hash_json(["recited", _told(row), shortest, length]) for row in rows]

        def asked(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            for place, told in enumerate(self._local.recited([rows[i] for i in missing], shortest, length, tick)):
                yield missing[place], {"recited": told}

        return [found["recited"] for found in self._all(keys, asked, tick)]

    def noted(self, name: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was found out of the subject under a name: made once, and kept with its answers."""

        def asked(missing: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
            yield 0, make()

        return self._all([hash_json(["noted", name])], asked, _silent)[0]

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
        lost = 0
        for i, found in asked(missing) if missing else ():
            row = {"key": keys[i], "found": found}
            if found.get("failure"):
                self._failed[keys[i]], lost = found["failure"], lost + 1
                if not self._answered and lost == min(DEAD, len(missing)):
                    raise ModelError(
                        f"answers nothing: {found['failure']}",
                        where=self.origin.get("name") or self.name,
                        fix="Check the address, the model's name and the key; what was answered before is kept.",
                    )
            else:
                self._answered = True
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
