"""The verbs that serve models, and move between their versions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli.options import Json, Runs, answer, hush
from tunesmith.errors import RunError

KEYS = "TUNESMITH_KEY"
Routes = Annotated[Path | None, typer.Option("--routes", help="The routes' file; routes.yaml beside the runs.")]
RouteName = Annotated[str, typer.Argument(metavar="ROUTE", help="The name that clients ask for.")]


def serve(
    targets: Annotated[
        list[str], typer.Argument(metavar="TARGET...", help="Runs, folders, hub ids, .gguf files; NAME=TARGET renames.")
    ],
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="NAME=FOLDER", help="A LoRA folder.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", help="The base of adapters that name none.")] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port.")] = 8000,
    key: Annotated[
        list[str] | None, typer.Option("--key", help=f"A key that clients must have; also by {KEYS}, comma between.")
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", help="Keeps traffic and feedback: sqlite:///FILE.")
    ] = None,
    routes: Routes = None,
    certificate: Annotated[Path | None, typer.Option("--tls-cert", help="A certificate's file: HTTPS.")] = None,
    private_key: Annotated[Path | None, typer.Option("--tls-key", help="Its private key's file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Serve what the gate holds, too; it is recorded.")] = False,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a serve key, as engine=llamacpp.")
    ] = None,
    runs: Runs = None,
) -> None:
    """Answer by models, with OpenAI's API: chat, completions, embeddings, tools, JSON; a chat page at /."""
    from tunesmith.api.launch import Place, launch

    secrets = [*(key or []), *(k.strip() for k in os.environ.get(KEYS, "").split(",") if k.strip())]
    launch(
        targets, adapter or [], sets or [], secrets, place=Place(host, port, certificate, private_key), base=base,
        database=database, routes=routes or _routes(runs), force=force, runs=runs,
    )  # fmt: skip


def promote(
    route: RouteName,
    version: Annotated[str, typer.Argument(metavar="MODEL", help="The model that takes over.")],
    share: Annotated[
        float, typer.Option("--share", min=0.0, max=1.0, help="A part of the requests, for a canary.")
    ] = 1.0,
    force: Annotated[bool, typer.Option("--force", help="Promote what the gate holds, too; it is recorded.")] = False,
    routes: Routes = None,
    runs: Runs = None,
    as_json: Json = False,
) -> None:
    """Send a route's requests to another version; servers that run take it over within a second."""
    hush(as_json)
    from tunesmith.api.launch import held_by_gate
    from tunesmith.serve import routes as file

    held = held_by_gate(version, runs)
    if held is not None and not force:
        held.fix = "Train a better one, or promote it all the same: --force (recorded)."
        raise held
    found = file.promote(routes or _routes(runs), route, version, share, held.what if held else None)
    if not answer(found, as_json):
        print(f"{route}: {_shares(found['versions'])}. Back: tunesmith rollback {route}")


def rollback(route: RouteName, routes: Routes = None, runs: Runs = None, as_json: Json = False) -> None:
    """Take back the last promotion of a route."""
    hush(as_json)
    from tunesmith.serve import routes as file

    found = file.rollback(routes or _routes(runs), route)
    if not answer(found, as_json):
        print(f"{route}: {_shares(found['versions'])}")


def _routes(runs: Path | None) -> Path:
    from tunesmith.runs import runs_folder

    return runs_folder(runs) / "routes.yaml"


def _shares(versions: dict[str, float]) -> str:
    total = sum(versions.values())
    return ", ".join(f"{name} {weight / total:.0%}" for name, weight in versions.items())


def talk_to(url: str, model: str | None, key: str | None, say: str | None, limit: int, as_json: bool) -> None:
    """`tunesmith chat --url`."""
    from tunesmith.talk import Far, once_with, talk_with

    chatter = Far(url, model, key or os.environ.get(KEYS, "").split(",")[0].strip())
    if as_json or say is not None:
        if not say:
            raise RunError("there is nothing to answer", where="--say", fix="Give it a text.")
        answers = once_with(chatter, say, limit)
        if not answer(answers, as_json):
            print(answers["answer"])
    else:
        talk_with({chatter.model: chatter}, limit)
