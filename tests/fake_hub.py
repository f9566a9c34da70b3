"""The part of a model hub that fetching a model needs, on this machine: pages, trees, files, doors and locks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.listening import Listening, Quiet

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """Serves folders as repositories. `gated` ones open to `token` only; `asked` tells what was wanted; `also` are
    names of files that it claims to have besides."""

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    token: str = "hf_test"
    asked: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(Quiet):
            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

        self.server = Listening(Handler)
        self.url = self.server.url
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()

    def answer(self, request: Quiet) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        parts = re.sub("^/(api/)?(models|datasets)(?=/)", "", path).strip("/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in self.repositories:
            return _send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if name in self.gated and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _send(request, 401, b"{}", {"X-Error-Code": "GatedRepo"})
        folder = self.repositories[name]
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in ("main", COMMIT):
            return _send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if path.startswith("/api/") and rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": _name(p, folder), "size": p.stat().st_size, "oid": _etag(p)} for p in files
            ]
            return _send(request, 200, json.dumps(tree).encode())
        if path.startswith("/api/"):
            names = [*(_name(p, folder) for p in files), *self.also]
            page = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in names]}
            return _send(request, 200, json.dumps(page).encode())
        wanted = folder / "/".join(rest[2:])
        if not wanted.is_file():
            return _send(request, 404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        headers = {"ETag": f'"{_etag(wanted)}"', "X-Repo-Commit": COMMIT}
        return _send(request, 200, wanted.read_bytes(), headers)


@contextmanager
def hub_of(patch: Any, folder: Path, repositories: dict[str, Path], gated: Iterable[str] = ()) -> Iterator[FakeHub]:
    """A hub of these repositories, for whatever fetches from one; its cache lies in `folder`."""
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    with FakeHub(repositories, gated=set(gated)) as server:
        patch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def _send(request: Quiet, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    request.send(body, status, **({"Content-Type": "application/json"} | (headers or {})))
