"""SQL by execution, on SQLite, read-only and with limits: does the query give the rows that the reference's gives?"""

from __future__ import annotations

import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, mean, rows

SECONDS, ROWS, BYTES = 5.0, 10_000, 2**20  # of one query: its time, its rows, its longest value
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
REFUSED_FUNCTIONS = {"load_extension", "readfile", "writefile", "fts3_tokenizer"}


def query_of(text: str) -> str:
    """The query in an answer: its first fenced block, else all of it."""
    found = re.search(r"```(?:sql|sqlite)?\s*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return (found[1] if found else text).strip().rstrip(";")


def _authorise(action: int, first: str | None, second: str | None, *_: Any) -> int:
    fine = action in ALLOWED and not (action == sqlite3.SQLITE_FUNCTION and second in REFUSED_FUNCTIONS)
    return sqlite3.SQLITE_OK if fine else sqlite3.SQLITE_DENY


@contextmanager
def opened(database: str) -> Iterator[sqlite3.Connection]:
    """A database that can only be read: an SQLite file, or in memory by a script of CREATE and INSERT.

    Raises:
        DataError: the script or file is not SQLite's.
    """
    path, is_file = Path(database), False
    with suppress(OSError):  # a script may be longer than a name can be
        is_file = path.is_file()
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro" if is_file else ":memory:", uri=True)) as db:
            if is_file:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            else:
                db.executescript(database)
            db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, BYTES)
            db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            db.set_authorizer(_authorise)
            yield db
    except sqlite3.Error as error:
        raise DataError(
            f"its database can't be opened ({error})",
            where="database",
            fix="Give an SQLite file, or a script of CREATE TABLE and INSERT.",
        ) from error


def result(db: sqlite3.Connection, query: str) -> list[tuple[Any, ...]] | None:
    """A query's rows; None where it fails, takes too long or gives too many."""
    end = time.monotonic() + SECONDS
    db.set_progress_handler(lambda: time.monotonic() > end, 10_000)
    try:
        found = db.execute(query).fetchmany(ROWS + 1)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, UnicodeError):
        return None
    finally:
        db.set_progress_handler(None, 0)
    return found if len(found) <= ROWS else None


def _rounded(found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in found]


def same_result(database: str, given: str, reference: str) -> bool:
    """Whether both queries give the same rows, in the same order where the reference orders them."""
    with opened(database) as db:
        wanted = result(db, query_of(reference))
        if wanted is None:
            raise DataError("a reference's query fails", where=reference[:80], fix="Mend the test rows.")
        got = result(db, query_of(given))
    if got is None:
        return False
    if re.search(r"\border\s+by\b", reference, re.IGNORECASE):
        return _rounded(got) == _rounded(wanted)
    return Counter(_rounded(got)) == Counter(_rounded(wanted))


def _stats(answers: Answers) -> Floats:
    databases = answers.told("database", "sql")
    odd = next((value for value in databases if not isinstance(value, str)), None)
    if odd is not None:
        fix = "Give an SQLite file, or a script of CREATE TABLE and INSERT."
        raise DataError(f"{str(odd)[:60]!r} is no database", where="database", fix=fix)
    triples = zip(databases, answers.given, answers.references, strict=True)
    return rows([float(same_result(d, g, r)) for d, g, r in triples])


sql = Metric("sql", _stats, mean, binary=True)
