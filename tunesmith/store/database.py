"""Opening a database, bringing it up to date, and transactions."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MachineError, first_line

try:
    import sqlalchemy as sa
    from alembic import command
    from alembic.config import Config
    from sqlalchemy.orm import Session
except ImportError as error:
    raise MachineError(
        f"the service's database needs {error.name}, which is not installed",
        fix="Install the extra: pip install 'tunesmith[service]'",
    ) from error

if TYPE_CHECKING:
    from tunesmith.store.answers import FeedbackTable, TrafficTable
    from tunesmith.store.audit import AuditLog
    from tunesmith.store.keys import Keys

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30
LOCK = 0x74756E65  # of PostgreSQL's advisory locks, the one that a migration holds


class Store:
    """A database that is up to date.

    `read()` and `write()` are transactions, each a `sqlalchemy.orm.Session`. On SQLite, a writing one takes the
    database's only write lock when it begins, so that nothing it has read can change under it.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self.engine = engine
        self._writing = engine.execution_options(write=True)

    @property
    def postgresql(self) -> bool:
        return self.engine.dialect.name == "postgresql"

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        with Session(self._writing, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()

    @cached_property
    def keys(self) -> Keys:
        from tunesmith.store.keys import Keys

        return Keys(self)

    @cached_property
    def audit(self) -> AuditLog:
        from tunesmith.store.audit import AuditLog

        return AuditLog(self)

    @cached_property
    def traffic(self) -> TrafficTable:
        from tunesmith.store.answers import TrafficTable

        return TrafficTable(self)

    @cached_property
    def feedback(self) -> FeedbackTable:
        from tunesmith.store.answers import FeedbackTable

        return FeedbackTable(self)


def connect(url: str) -> Store:
    """As `store.open`."""
    try:
        address = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise MachineError(
            "is not a database's address", where=url, fix="Write sqlite:///file.db or postgresql://user@host/name."
        ) from None
    shown = address.render_as_string(hide_password=True)
    if address.drivername in ("postgresql", "postgres"):
        address = address.set(drivername="postgresql+psycopg")
    if address.get_backend_name() not in ("sqlite", "postgresql"):
        raise MachineError(
            f"{address.get_backend_name()} is not supported", where=shown, fix="Use SQLite or PostgreSQL."
        )
    try:
        engine = _sqlite(address) if address.get_backend_name() == "sqlite" else _postgresql(address)
        migrate(engine)
    except ImportError as error:
        raise MachineError(
            f"{error.name} is not installed", where=shown, fix="Install the extra: pip install 'tunesmith[service]'"
        ) from error
    except (sa.exc.OperationalError, sa.exc.DatabaseError, OSError) as error:
        raise MachineError(
            f"the database can't be opened ({first_line(getattr(error, 'orig', None) or error)})",
            where=shown,
            fix="Check the address, and that the database is running.",
        ) from error
    return Store(engine)


def _sqlite(address: sa.URL) -> sa.Engine:
    if address.database:
        Path(address.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(address, connect_args={"timeout": BUSY_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def set_up(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA secure_delete=ON")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(address: sa.URL) -> sa.Engine:
    return sa.create_engine(address, pool_pre_ping=True, pool_size=10, max_overflow=20)


def migrate(engine: sa.Engine) -> None:
    """Bring the tables up to date; others that start at the same moment wait."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with _alone(engine), engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()


@contextlib.contextmanager
def _alone(engine: sa.Engine) -> Iterator[None]:
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            connection.exec_driver_sql(f"SELECT pg_advisory_lock({LOCK})")
            connection.commit()
            try:
                yield
            finally:
                connection.exec_driver_sql(f"SELECT pg_advisory_unlock({LOCK})")
                connection.commit()
    elif engine.url.database:
        from filelock import FileLock

        with FileLock(f"{engine.url.database}.lock"):
            yield
    else:
        yield
