"""The database: tables, migrations, sessions. SQLite by default, PostgreSQL by URL.

Nothing is loaded before a store is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tunesmith.store.database import Store

__all__ = ["open"]


def open(url: str) -> Store:
    """The database at an address (`sqlite:///file.db`, `postgresql://host/name`), brought up to date under a lock.

    Raises:
        MachineError: SQLAlchemy or the database's driver is not installed, or the database can't be reached.
    """
    from tunesmith.store.database import connect

    return connect(url)
