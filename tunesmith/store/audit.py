"""Who changed what, written in the transaction that changes it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tunesmith.store import ids
from tunesmith.store.tables import Audit

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from tunesmith.store.database import Store


def record(
    session: Session,
    project: str | None,
    key: str | None,
    action: str,
    target: str | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    """Note a change, as `what.verb` on `target`; it stands or falls with the session's other changes."""
    session.add(
        Audit(
            id=ids.new("audit_log-"),
            created_at=int(time.time()),
            project=project,
            key=key,
            action=action,
            target=target,
            details=details or {},
        )
    )


class AuditLog:
    """The log, read."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def export(self, project: str | None = None, since: int | None = None) -> Iterator[dict[str, Any]]:
        """Every change, oldest first."""
        asked = sa.select(Audit).order_by(Audit.n)
        if project is not None:
            asked = asked.where(Audit.project == project)
        if since is not None:
            asked = asked.where(Audit.created_at >= since)
        with self.store.read() as session:
            for line in session.scalars(asked.execution_options(yield_per=500)):
                yield {
                    "id": line.id,
                    "object": "audit_log",
                    "created_at": line.created_at,
                    "project": line.project,
                    "key": line.key,
                    "action": line.action,
                    "target": line.target,
                    "details": line.details,
                }
