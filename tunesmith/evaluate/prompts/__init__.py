"""Prompts that come with Tunesmith, written for it: a kind a section, a prompt a line."""

from __future__ import annotations

from functools import cache
from importlib.resources import files


@cache
def prompts(name: str) -> tuple[tuple[str, str], ...]:
    """(kind, prompt) of every line of a file."""
    found, kind = [], ""
    for line in (files(__package__) / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            kind = line[2:]
        elif line.strip():
            found.append((kind, line))
    return tuple(found)
