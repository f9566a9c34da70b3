"""Routes: one name for several versions of a model, by weight; and moving from one version to another.

Routes lie in a file, which running servers read again when it changes. It is replaced by a rename, so that a server
sees the old routes or the new ones, and a promotion can be taken back by one command.
"""

from __future__ import annotations

import getpass
import hashlib
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock
from pydantic import ValidationError

from tunesmith.errors import RunError, nearest
from tunesmith.runs import write_text
from tunesmith.serve.section import RouteSection

KEPT = 50  # steps of a route's history


@dataclass(frozen=True)
class Way:
    """Who may answer a request, first choice first, and who is asked in the shadow."""

    models: tuple[str, ...]
    shadow: str | None = None


def way(route: RouteSection, name: str, user: str | None, draw: random.Random | None = None) -> Way:
    """Where a request goes. With `sticky: user`, a user's requests all go to one version for as long as weights stay.

    Args:
        user: who the answer is for; without one, versions are drawn.
    """
    dice = draw or random
    point = _share(f"{name}:{user}") if route.sticky == "user" and user else dice.random()
    total, first = sum(route.versions.values()), next(reversed(route.versions))
    for version, weight in route.versions.items():
        point -= weight / total
        if point < 0:
            first = version
            break
    shadow = route.shadow if route.shadow and dice.random() < route.shadow_share else None
    return Way((first, *(m for m in route.fallback if m != first)), shadow)


def _share(text: str) -> float:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def named(routes: Mapping[str, RouteSection]) -> list[str]:
    """The models that get requests by these routes."""
    every = [m for r in routes.values() for m in (*(v for v, w in r.versions.items() if w), *r.fallback, r.shadow) if m]
    return list(dict.fromkeys(every))


def read(path: Path) -> dict[str, RouteSection]:
    """The routes of a file; none where there is none.

    Raises:
        RunError: the file can't be understood.
    """
    return {name: _section(path, name, keys) for name, keys in _raw(path).items()}


def forced(path: Path) -> set[str]:
    """The versions that were promoted though a gate holds them."""
    steps = [step for keys in _raw(path).values() if isinstance(keys, dict) for step in keys.get("history") or ()]
    return {step["version"] for step in steps if isinstance(step, dict) and step.get("forced")}


def _raw(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"can't be read ({error})", where=str(path), fix="Mend it, or remove it.") from error
    if not isinstance(found, dict):
        raise RunError("holds no routes", where=str(path), fix="Write name: {versions: {model: weight}}.")
    return found


def _section(path: Path, name: str, keys: Any) -> RouteSection:
    try:
        return RouteSection.model_validate({k: v for k, v in dict(keys).items() if k != "history"})
    except (ValidationError, TypeError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise RunError(f"is no route ({why})", where=f"{path}: {name}", fix="See docs/serving.md.") from error


def promote(path: Path, route: str, version: str, share: float = 1.0, forced: str | None = None) -> dict[str, Any]:
    """Give a version all of a route's requests, or a share of them; the others keep theirs among the rest.

    Args:
        forced: why a gate held the version, where it is promoted all the same; it is recorded.
    """

    def change(keys: dict[str, Any]) -> dict[str, Any]:
        before: Mapping[str, float] = keys.get("versions") or {}
        others = {name: weight for name, weight in before.items() if name != version}
        total = sum(others.values())
        rest = {name: round(weight / total * (1 - share), 6) for name, weight in others.items()} if share < 1 else {}
        if share < 1 and not rest:
            raise RunError("has no other version to share with", where=route, fix="Leave out --share.")
        return keys | {"versions": {**rest, version: share}}

    return _changed(path, route, "promote", change, {"version": version, "share": share, "forced": forced})


def rollback(path: Path, route: str) -> dict[str, Any]:
    """Take back the last promotion of a route.

    Raises:
        RunError: there is none.
    """

    def change(keys: dict[str, Any]) -> dict[str, Any]:
        history = keys.get("history") or []
        if not keys or not history or not history[-1].get("before"):
            fix = f"Routes: {', '.join(_raw(path)) or 'none'}{nearest(route, _raw(path))}"
            raise RunError("has no earlier versions to go back to", where=f"{path}: {route}", fix=fix)
        return keys | {"versions": history[-1]["before"], "history": history[:-1]}

    return _changed(path, route, "rollback", change, None)


def _changed(path: Path, route: str, what: str, change: Any, noted: dict[str, Any] | None) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        routes = _raw(path)
        keys = dict(routes.get(route) or {})
        before = keys.get("versions")
        keys = change(keys)
        if noted is not None:
            step = {k: v for k, v in noted.items() if v is not None} | {
                "what": what,
                "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "by": getpass.getuser(),
                "before": before,
            }
            keys["history"] = [*(keys.get("history") or []), step][-KEPT:]
        _section(path, route, keys)
        write_text(path, yaml.safe_dump(routes | {route: keys}, sort_keys=False, allow_unicode=True))
    return {"route": route, "versions": keys["versions"], "before": before}
