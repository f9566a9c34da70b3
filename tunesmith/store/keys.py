"""Projects, users and keys: who somebody is and what they may do."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from tunesmith.errors import RunError
from tunesmith.store import ids
from tunesmith.store.audit import record
from tunesmith.store.callers import ROLES, Caller, Role
from tunesmith.store.tables import Key, Project, User

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from tunesmith.store.database import Store

SCOPES = ("files", "jobs", "models", "chat", "feedback", "admin")
DEFAULT_PROJECT = "default"
FIRST = 0x6B657973  # of PostgreSQL's advisory locks, the one that who makes the first key holds
USED_EVERY = 60  # seconds between notes of when a key was last used


class Keys:
    """Projects, users and keys of a database."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def caller(self, secret: str) -> Caller | None:
        """Whose secret that is; None for one that is unknown, revoked or over its time."""
        now = int(time.time())
        with self.store.read() as session:
            key = session.scalar(sa.select(Key).where(Key.hash == hashed(secret)))
        if key is None or (key.expires_at is not None and key.expires_at <= now):
            return None
        if key.used_at is None or now - key.used_at >= USED_EVERY:
            with contextlib.suppress(sa.exc.DBAPIError), self.store.write() as session:  # a key opens all the same
                session.execute(sa.update(Key).where(Key.id == key.id).values(used_at=now))
        return Caller(key.id, key.project, key.role, frozenset(key.scopes), key.rpm, key.token_quota)  # type: ignore[arg-type]

    def any(self) -> bool:
        """Whether a key was ever made here."""
        with self.store.read() as session:
            return session.scalar(sa.select(Key.n).limit(1)) is not None

    def create(
        self,
        name: str,
        *,
        project: str = DEFAULT_PROJECT,
        role: Role = "runner",
        user: str | None = None,
        scopes: tuple[str, ...] = (),
        expires_at: int | None = None,
        rpm: int | None = None,
        token_quota: int | None = None,
        jobs_at_once: int | None = None,
        by: str | None = None,
    ) -> tuple[Key, str]:
        """A new key and its secret, which is shown this once.

        Args:
            project: a project's id or name; "default" is made where it is not there yet.
            by: the key that asks for it, for the audit log.

        Raises:
            RunError: no such project, user, role or scope, or the role is above the user's.
        """
        _known("role", role, ROLES)
        for scope in scopes:
            _known("scope", scope, SCOPES)
        with self.store.write() as session:
            limits = {"rpm": rpm, "token_quota": token_quota, "jobs_at_once": jobs_at_once, "expires_at": expires_at}
            key, secret = _made(session, name, project, role, user=user, scopes=list(scopes), **limits)
            told = {"name": name, "role": role, "scopes": list(scopes)}
            record(session, key.project, by, "key.create", key.id, told)
        return key, secret

    def first(self) -> str | None:
        """The first key's secret, an admin's; None where there are keys already. One process alone gets it."""
        with self.store.write() as session:
            if self.store.postgresql:
                session.execute(sa.text(f"SELECT pg_advisory_xact_lock({FIRST})"))
            if session.scalar(sa.select(Key.n).limit(1)) is not None:
                return None
            key, secret = _made(session, "first", DEFAULT_PROJECT, "admin")
            record(session, key.project, None, "key.create", key.id, {"name": key.name, "role": key.role})
        return secret

    def every(self, project: str | None = None) -> list[Key]:
        with self.store.read() as session:
            asked = sa.select(Key).order_by(Key.n)
            return list(session.scalars(asked.where(Key.project == project) if project else asked))

    def revoke(self, key: str, project: str | None = None, by: str | None = None) -> bool:
        """Remove a key; False where there is none."""
        with self.store.write() as session:
            found = session.scalar(sa.select(Key).where(Key.id == key))
            if found is None or (project is not None and found.project != project):
                return False
            session.delete(found)
            record(session, found.project, by, "key.delete", key, {"name": found.name})
        return True

    def spend(self, key: str, tokens: int) -> int:
        """Count tokens against a key's quota; returns how many it has used in all."""
        with self.store.write() as session:
            session.execute(sa.update(Key).where(Key.id == key).values(tokens_used=Key.tokens_used + tokens))
            return session.scalar(sa.select(Key.tokens_used).where(Key.id == key)) or 0

    def spent(self, key: str) -> int:
        """Tokens that a key has used in all."""
        with self.store.read() as session:
            return session.scalar(sa.select(Key.tokens_used).where(Key.id == key)) or 0

    def create_project(self, name: str, by: str | None = None) -> Project:
        """A new project.

        Raises:
            RunError: the name is taken, or can't stand in a model's name.
        """
        if not name or len(name) > 64 or not all(c.isalnum() or c in "-_." for c in name):
            raise RunError(
                f"'{name[:80]}' can't be a project's name", fix="Use letters, digits, dots, dashes and underscores."
            )
        with self.store.write() as session:
            if session.scalar(sa.select(Project).where(Project.name == name)) is not None:
                raise RunError(f"there is a project '{name}'", fix="Choose another name.")
            project = Project(id=ids.new("proj_"), name=name, created_at=int(time.time()))
            session.add(project)
            record(session, project.id, by, "project.create", project.id, {"name": name})
        return project

    def projects(self) -> list[Project]:
        with self.store.read() as session:
            return list(session.scalars(sa.select(Project).order_by(Project.n)))

    def project(self, id: str) -> Project | None:
        with self.store.read() as session:
            return session.scalar(sa.select(Project).where(Project.id == id))

    def create_user(self, name: str, project: str, role: Role = "runner", by: str | None = None) -> User:
        """A new person of a project."""
        _known("role", role, ROLES)
        with self.store.write() as session:
            owner = _project(session, project)
            user = User(id=ids.new("user-"), project=owner.id, name=name, role=role, created_at=int(time.time()))
            session.add(user)
            record(session, owner.id, by, "user.create", user.id, {"name": name, "role": role})
        return user

    def users(self, project: str | None = None) -> list[User]:
        with self.store.read() as session:
            asked = sa.select(User).order_by(User.n)
            return list(session.scalars(asked.where(User.project == project) if project else asked))

    def remove_user(self, user: str, project: str, by: str | None = None) -> int | None:
        """Remove a person and their keys; returns how many keys, or None where there is no such person."""
        with self.store.write() as session:
            found = session.scalar(sa.select(User).filter_by(id=user, project=project))
            if found is None:
                return None
            keys = list(session.scalars(sa.select(Key).where(Key.user == user)))
            for key in keys:
                session.delete(key)
            session.flush()
            session.delete(found)
            record(session, project, by, "user.delete", user, {"name": found.name, "keys": [k.id for k in keys]})
        return len(keys)


def hashed(secret: str) -> str:
    """What is kept of a secret. It has 256 random bits, so a plain hash can't be searched."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _made(
    session: Session, name: str, project: str, role: Role, user: str | None = None, **more: Any
) -> tuple[Key, str]:
    """A key's row, and its secret."""
    owner = _project(session, project)
    if user is not None:
        person = session.scalar(sa.select(User).filter_by(id=user, project=owner.id))
        if person is None:
            raise RunError(f"no user '{user}' in project '{owner.name}'", fix="Make the user first.")
        if ROLES.index(role) > ROLES.index(person.role):
            raise RunError(f"'{person.name}' is a {person.role}, no {role}", fix="Give their role, or a lower one.")
    secret = "sk-" + secrets.token_urlsafe(32)
    key = Key(
        id=ids.new("key_"),
        project=owner.id,
        user=user,
        name=name,
        hash=hashed(secret),
        hint=f"sk-...{secret[-4:]}",
        role=role,
        created_at=int(time.time()),
        **{"scopes": []} | more,
    )
    session.add(key)
    return key, secret


def _project(session: Session, name: str) -> Project:
    found = session.scalar(sa.select(Project).where((Project.id == name) | (Project.name == name)))
    if found is None and name == DEFAULT_PROJECT:
        found = Project(id=ids.new("proj_"), name=name, created_at=int(time.time()))
        session.add(found)
        session.flush()
    if found is None:
        there = ", ".join(session.scalars(sa.select(Project.name).order_by(Project.n)))
        raise RunError(f"no project '{name}'", fix=f"There are: {there or 'none'}.")
    return found


def _known(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RunError(f"no {what} is called '{value}'", fix=f"There are: {', '.join(known)}.")
