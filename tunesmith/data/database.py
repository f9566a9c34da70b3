"""A database's answer to a query -> a JSONL file in the cache, by its content."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from tunesmith.data.remote import keeping
from tunesmith.data.values import written
from tunesmith.errors import DataError, MachineError, first_line
from tunesmith.progress import bar

ROWS_AT_ONCE = 1000


def run_query(url: str, query: str, folder: Path, key: str) -> Path:
    """Ask a database (an SQLAlchemy URL; SQLite's path is relative to `folder`) and keep the rows.

    What the query might have changed is rolled back.

    Raises:
        DataError: the URL, the database or the query is refused; says what the database says.
        MachineError: SQLAlchemy or the database's driver is not installed.
    """
    try:
        import sqlalchemy as sa
        from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
    except ImportError as error:
        raise MachineError(
            "sql: needs SQLAlchemy",
            where=key,
            fix="Install it: pip install 'tunesmith[sql]' and your database's driver.",
        ) from error
    try:
        address = sa.make_url(os.path.expandvars(url))
        if address.get_backend_name() == "sqlite" and address.database:
            file = folder / Path(address.database).expanduser()
            if not file.is_file():
                raise DataError(
                    f"no such database: {file}", where=key, fix="Paths are relative to the recipe's folder."
                )
            address = address.set(database=str(file))
        engine = sa.create_engine(address)
    except (ArgumentError, NoSuchModuleError) as error:
        raise DataError(
            f"is no database's URL ({first_line(error)})",
            where=key,
            fix="As in sqlite:///tickets.db or postgresql+psycopg://user:${PASSWORD}@host/name.",
        ) from error
    except ImportError as error:
        raise MachineError(
            f"the database's driver is not installed ({error})", where=key, fix=f"pip install {error.name}"
        ) from error
    shown = address.render_as_string(hide_password=True)
    try:
        with (
            engine.connect() as connection,
            keeping("query.jsonl") as kept,
            bar("Reading rows") as progress,
        ):
            answer = connection.execution_options(stream_results=True, yield_per=ROWS_AT_ONCE).execute(sa.text(query))
            if not answer.returns_rows:
                raise DataError("gives no rows", where=f"{key}.query", fix="Write a SELECT.")
            names = list(answer.keys())
            twice = [name for name, n in Counter(names).items() if n > 1]
            if twice:
                raise DataError(
                    f"gives two columns named '{twice[0]}'", where=f"{key}.query", fix="Name one otherwise: AS ..."
                )
            for row in answer:
                line = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=True, default=_plain)
                kept.file.write(line.encode() + b"\n")
                progress.advance()
            connection.rollback()
    except SQLAlchemyError as error:
        told = first_line(getattr(error, "orig", None) or error)
        raise DataError(
            f"{shown} refuses the query ({told})",
            where=f"{key}.query",
            fix="Try it in the database's own client.",
        ) from error
    finally:
        engine.dispose()
    return kept.path


def _plain(value: Any) -> str:
    """What JSON has no form for, as text; bytes as UTF-8 or else in hexadecimal."""
    if isinstance(value, bytes | memoryview):
        raw = bytes(value)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw.hex()
    return written(value)
