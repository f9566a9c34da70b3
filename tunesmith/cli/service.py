"""`tunesmith up`, `tunesmith keys` and `tunesmith audit`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.options import Json, answer
from tunesmith.errors import MachineError, RunError

keys_app = typer.Typer(help="Hand out keys of the service, list and revoke them.", no_args_is_help=True)
SettingsFile = Annotated[
    Path | None, typer.Argument(metavar="[SETTINGS]", help="A YAML file with `service:` and `serve:`; docs/service.md.")
]
Database = Annotated[
    str | None, typer.Option("--database", help="postgresql://user@host/name; a SQLite file in --home if not given.")
]
Home = Annotated[Path | None, typer.Option("--home", help="This machine's folder; ./tunesmith-service if not given.")]


def _needs_the_extra() -> None:
    try:
        import alembic  # noqa: F401
        import fastapi  # noqa: F401
        import sqlalchemy  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MachineError(
            f"the service needs {error.name}, which is not installed",
            where="tunesmith up",
            fix="Install the extra: pip install 'tunesmith[service]'",
        ) from None


def up(
    settings: SettingsFile = None,
    role: Annotated[str, typer.Option("--role", help="all, api or worker: what this machine does.")] = "all",
    workers: Annotated[int | None, typer.Option("--workers", min=0, help="Jobs trained here at once; 1.")] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    database: Database = None,
    artifacts: Annotated[
        str | None, typer.Option("--artifacts", help="A folder or fsspec URL for files and models.")
    ] = None,
    home: Home = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME[=WHERE]", help="What can be fine-tuned; may be repeated."),
    ] = None,
    certificate: Annotated[Path | None, typer.Option("--certificate", help="TLS: a certificate's file.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="TLS: its key's file.")] = None,
    as_json: Json = False,
) -> None:
    """Start the fine-tuning service: API, workers and models together, for OpenAI's own client."""
    _needs_the_extra()
    from tunesmith.api.up import Place, read_settings
    from tunesmith.api.up import up as run

    if role not in ("all", "api", "worker"):
        raise RunError(f"no role is called '{role}'", where="--role", fix="There are: all, api, worker.")
    given = {"database": database, "artifacts": artifacts, "home": str(home) if home else None, "workers": workers}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if model:
        pairs = [one.partition("=") for one in model]
        changes["models"] = {name: where or name for name, _, where in pairs}

    def told(facts: dict[str, Any]) -> None:
        if as_json:
            print(json.dumps(facts), flush=True)
            return
        if "url" in facts:
            print(f"Tunesmith answers at {facts['url']}  (OpenAI's clients: base_url={facts['url']}/v1)", flush=True)
        if "admin_key" in facts:
            print(f"An admin's key, shown this once: {facts['admin_key']}", flush=True)
        if "workers" in facts:
            print(f"{facts['workers']} workers wait for jobs", flush=True)

    run(read_settings(settings, changes), Place(host, port, certificate, key), role, told)  # type: ignore[arg-type]


def _store(database: str | None, home: Path | None) -> Any:
    _needs_the_extra()
    from tunesmith import store
    from tunesmith.jobs.section import ServiceSection

    given = {"database": database, "home": str(home) if home else None}
    return store.open(ServiceSection(**{k: v for k, v in given.items() if v is not None}).database_url)


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    role: Annotated[str, typer.Option("--role", help="viewer, runner or admin.")] = "runner",
    project: Annotated[
        str, typer.Option("--project", help="A project's name or id; a new name makes one.")
    ] = "default",
    scope: Annotated[
        list[str] | None, typer.Option("--scope", help="A part that it is for: files, jobs, models, chat...")
    ] = None,
    days: Annotated[int | None, typer.Option("--days", min=1, help="Days until it expires.")] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", min=1, help="Requests a minute.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=0, help="Tokens in all.")] = None,
    database: Database = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """A new key. Its secret is shown this once."""
    opened = _store(database, home)
    if project not in {p.name for p in opened.keys.projects()} | {p.id for p in opened.keys.projects()}:
        opened.keys.create_project(project)
    expires = int(time.time()) + days * 86400 if days else None
    limits = {"expires_at": expires, "rpm": rpm, "token_quota": tokens}
    made, secret = opened.keys.create(name, project=project, role=role, scopes=tuple(scope or ()), **limits)
    if not answer({"id": made.id, "project": made.project, "role": made.role, "key": secret}, as_json):
        print(f"{secret}\n{made.id}, role {made.role}; the key is shown this once.")


@keys_app.command("list")
def keys_list(database: Database = None, home: Home = None, as_json: Json = False) -> None:
    """All keys, without their secrets."""
    from tunesmith import show

    opened = _store(database, home)
    names = {p.id: p.name for p in opened.keys.projects()}
    found = [
        {
            "id": k.id,
            "name": k.name,
            "project": names[k.project],
            "role": k.role,
            "key": k.hint,
            "expires": k.expires_at,
        }
        for k in opened.keys.every()
    ]
    if not answer(found, as_json):
        show.table(found, "No keys yet.")


@keys_app.command("revoke")
def keys_revoke(
    key: Annotated[str, typer.Argument(metavar="ID")],
    database: Database = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Have a key open nothing any more."""
    if not _store(database, home).keys.revoke(key):
        raise RunError(f"no key '{key}'", where="keys revoke", fix="tunesmith keys list")
    if not answer({"revoked": key}, as_json):
        print(f"Revoked {key}")


def audit(database: Database = None, home: Home = None) -> None:
    """Every change of the service, oldest first, as JSON lines."""
    for line in _store(database, home).audit.export():
        print(json.dumps(line, ensure_ascii=False))
