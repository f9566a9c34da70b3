"""What was answered, and what people said of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tunesmith.store import ids
from tunesmith.store.tables import Feedback, Traffic

if TYPE_CHECKING:
    from tunesmith.store.database import Store


@dataclass(frozen=True)
class Answered:
    """One answer that was served.

    Attributes:
        id: as the client has it (chatcmpl-...).
        model: as asked for; `served_by`, where routing chose another.
        request, response: their text, redacted, or None where it is not kept.
        flags: what guards found.
    """

    id: str
    endpoint: str
    model: str
    project: str | None = None
    key: str | None = None
    served_by: str | None = None
    user: str | None = None
    status: int = 200
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    flags: list[Any] = field(default_factory=list)
    request: dict[str, Any] | None = None
    response: dict[str, Any] | None = None
    created_at: float = field(default_factory=time.time)


class TrafficTable:
    """Answers, kept for as long as retention says."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(self, *answers: Answered) -> None:
        """Keep some answers, in one transaction."""
        if answers:
            with self.store.write() as session:
                session.execute(sa.insert(Traffic), [asdict(answer) for answer in answers])

    def get(self, id: str, project: str | None = None) -> Traffic | None:
        """An answer, of that project if one is given."""
        with self.store.read() as session:
            found = session.scalar(sa.select(Traffic).where(Traffic.id == id))
        return found if found is not None and project in (None, found.project) else None

    def export(self, project: str | None = None, since: float | None = None) -> Iterator[Traffic]:
        """Answers, oldest first."""
        asked = sa.select(Traffic).order_by(Traffic.n)
        if project is not None:
            asked = asked.where(Traffic.project == project)
        if since is not None:
            asked = asked.where(Traffic.created_at >= since)
        with self.store.read() as session:
            yield from session.scalars(asked.execution_options(yield_per=500))

    def forget(self, before: float) -> int:
        """Delete answers older than a time, and what was said of them; returns how many."""
        with self.store.write() as session:
            done = session.execute(sa.delete(Traffic).where(Traffic.created_at < before))
            return int(done.rowcount)  # type: ignore[attr-defined]


class FeedbackTable:
    """What people said of answers."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(
        self,
        answer: str,
        *,
        project: str | None = None,
        key: str | None = None,
        rating: float | None = None,
        correction: str | None = None,
        comment: str | None = None,
    ) -> str | None:
        """Keep a verdict; returns its id, or None where that project was given no such answer."""
        with self.store.write() as session:
            found = session.scalar(sa.select(Traffic).where(Traffic.id == answer))
            if found is None or found.project != project:
                return None
            said = Feedback(
                id=ids.new("feedback-"),
                answer=answer,
                project=project,
                key=key,
                created_at=time.time(),
                rating=rating,
                correction=correction,
                comment=comment,
            )
            session.add(said)
        return said.id

    def of(self, answer: str) -> Sequence[Feedback]:
        with self.store.read() as session:
            return list(session.scalars(sa.select(Feedback).where(Feedback.answer == answer).order_by(Feedback.n)))
