"""The database: the same on SQLite and PostgreSQL, migrated once however many begin, keys that are not kept."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from tunesmith import store
from tunesmith.errors import MachineError, RunError
from tunesmith.store.answers import Answered
from tunesmith.store.tables import Key, Table


def test_migrations_make_the_tables_that_the_code_has(database: str) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    opened = store.open(database)
    with opened.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    store.open(database).close()  # a second time changes nothing
    opened.close()


def test_an_older_database_keeps_its_rows(database: str) -> None:
    """From every version that there was: rows that were there stay, and what is new has no value in them."""
    from alembic import command
    from alembic.config import Config

    from tunesmith.store.database import MIGRATIONS
    from tunesmith.store.tables import Upload

    opened = store.open(database)
    project = opened.keys.create_project("p").id
    opened.close()
    engine = sa.create_engine(database.replace("postgresql:", "postgresql+psycopg:"))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    row = {"id": "upload_old", "filename": "rows.jsonl", "purpose": "fine-tune", "mime_type": "text/plain", "bytes": 5}
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
        old = sa.Table("uploads", sa.MetaData(), autoload_with=connection)
        assert "keep_for" not in old.c
        connection.execute(sa.insert(old).values(**row, project=project, status="pending", created_at=1, expires_at=2))
        connection.commit()
    engine.dispose()
    opened = store.open(database)
    with opened.write() as session:
        found = session.scalars(sa.select(Upload)).one()
        assert {k: getattr(found, k) for k in row} == row and (found.project, found.keep_for) == (project, None)
        found.keep_for = 60
    with opened.read() as session:
        assert session.scalars(sa.select(Upload.keep_for)).one() == 60
    opened.close()


def test_many_that_begin_together_migrate_once(database: str) -> None:
    failed: list[Exception] = []

    def begin() -> None:
        try:
            store.open(database).close()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_key_opens_and_its_secret_is_nowhere(database: str, tmp_path: Path) -> None:
    opened = store.open(database)
    assert not opened.keys.any()
    key, secret = opened.keys.create("mine", role="admin", scopes=("jobs",), rpm=5)
    caller = opened.keys.caller(secret)
    assert caller is not None and (caller.key, caller.role, caller.rpm) == (key.id, "admin", 5)
    assert caller.may("runner", "jobs") and not caller.may("runner", "files")
    assert opened.keys.caller(secret + "x") is None
    with opened.read() as session:
        row = session.execute(sa.select(Key.__table__)).mappings().one()
    assert secret not in json.dumps(dict(row), default=str)
    if "sqlite" in database:
        assert secret.encode() not in (tmp_path / "tunesmith.db").read_bytes()
    assert opened.keys.revoke(key.id) and opened.keys.caller(secret) is None
    assert not opened.keys.revoke(key.id)
    assert [line["action"] for line in opened.audit.export()] == ["key.create", "key.delete"]
    opened.close()


def test_keys_expire_and_belong_to_projects_and_people(database: str) -> None:
    opened = store.open(database)
    _, past = opened.keys.create("late", expires_at=int(time.time()) - 1)
    assert opened.keys.caller(past) is None
    team = opened.keys.create_project("team-a")
    ada = opened.keys.create_user("Ada", team.id)
    _, secret = opened.keys.create("hers", project="team-a", user=ada.id, role="viewer")
    caller = opened.keys.caller(secret)
    assert caller is not None and caller.project == team.id and not caller.may("runner")
    for wrong in (
        lambda: opened.keys.create("x", project="no-such"),
        lambda: opened.keys.create("x", role="owner"),  # type: ignore[arg-type]
        lambda: opened.keys.create("x", scopes=("everything",)),
        lambda: opened.keys.create("x", user=ada.id),
        lambda: opened.keys.create_project("team-a"),
        lambda: opened.keys.create_project("a:b"),
    ):
        with pytest.raises(RunError):
            wrong()
    assert opened.keys.remove_user(ada.id, team.id) == 1
    assert opened.keys.caller(secret) is None
    opened.close()


def test_tokens_are_counted_by_many_at_once(database: str) -> None:
    opened = store.open(database)
    key, _ = opened.keys.create("counted", token_quota=100)
    threads = [threading.Thread(target=lambda: [opened.keys.spend(key.id, 1) for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened.keys.spent(key.id) == 40
    opened.close()


def test_a_key_opens_while_nothing_can_be_written(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = store.open(database)
    _, secret = opened.keys.create("mine")

    def busy() -> None:
        raise sa.exc.OperationalError("BEGIN IMMEDIATE", {}, Exception("database is locked"))

    monkeypatch.setattr(opened, "write", busy)
    assert opened.keys.caller(secret) is not None
    monkeypatch.undo()
    opened.close()


def test_postgresql_refuses_values_and_that_is_a_400(database: str) -> None:
    from tunesmith.api.errors import told

    opened = store.open(database)
    try:
        opened.keys.create_user("a\0b", "default")
    except sa.exc.SQLAlchemyError as error:
        assert told(error).status == 400
    opened.close()


def test_feedback_is_on_answers_of_ones_own_and_goes_with_them(database: str) -> None:
    opened = store.open(database)
    mine, other = opened.keys.create_project("mine"), opened.keys.create_project("other")
    old = Answered("chatcmpl-1", "chat", "m", project=mine.id, created_at=1.0, request={"a": 1})
    opened.traffic.add(old, Answered("chatcmpl-2", "chat", "m", project=mine.id))
    assert opened.feedback.add("chatcmpl-1", project=mine.id, rating=1.0, comment="good")
    assert opened.feedback.add("chatcmpl-1", project=other.id, rating=0.0) is None
    assert opened.feedback.add("chatcmpl-9", project=mine.id) is None
    assert [said.comment for said in opened.feedback.of("chatcmpl-1")] == ["good"]
    assert [line.id for line in opened.traffic.export(mine.id)] == ["chatcmpl-1", "chatcmpl-2"]
    assert opened.traffic.forget(before=2.0) == 1
    assert opened.feedback.of("chatcmpl-1") == [] and opened.traffic.get("chatcmpl-2", mine.id) is not None
    assert opened.traffic.get("chatcmpl-2", other.id) is None
    opened.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("nonsense", "not a database's address"),
        ("mysql://host/x", "not supported"),
        ("postgresql://u:secret@127.0.0.1:1/none", "can't be opened"),
        ("sqlite:////proc/none/x.db", "can't be opened"),
    ],
)
def test_a_database_that_can_not_be_opened_is_an_error_of_ours(url: str, says: str) -> None:
    with pytest.raises(MachineError, match=says) as told:
        store.open(url)
    assert "secret" not in str(told.value)


def test_importing_the_store_loads_no_database() -> None:
    probe = "import tunesmith.store, sys; print('sqlalchemy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
