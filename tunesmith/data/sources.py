"""A recipe's sources -> the files that hold their rows, and those files' rows."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tunesmith import plugins
from tunesmith.data.formats import format_of
from tunesmith.data.opening import Broken, Row, Span, state_of
from tunesmith.data.section import DataSection, SourceSection, is_url
from tunesmith.errors import DataError

Files = dict[str, list[tuple[SourceSection, Path]]]


def source_files(section: DataSection, folder: Path) -> Files:
    """The files of each part, fetched where they are elsewhere. `train` holds everything that is still to be split.

    Raises:
        DataError: a source that matches nothing or can't be reached.
    """
    found: Files = {"train": [], "validation": [], "test": []}
    for number, source in enumerate(section.sources):
        if source.media_folder is not None:
            there = folder / Path(os.path.expandvars(source.media_folder)).expanduser()
            source = source.model_copy(update={"media_folder": str(there)})
        found["train"] += _files(source, folder, f"data.sources.{number}")
    for part in ("validation", "test"):
        given = getattr(section.split, part)
        if isinstance(given, str):
            paths = matching(given, folder, f"data.split.{part}")
            like = {ending: _like(found["train"], given, ending) for ending in {path.suffix for path in paths}}
            found[part] = [(like[path.suffix], path) for path in paths]
    return found


def _like(sources: list[tuple[SourceSection, Path]], given: str, ending: str) -> SourceSection:
    """The source of held-out rows in files of their own: as the first one, with the tag that all of them have. A named
    format counts for files that end as its own do."""
    first, there = sources[0]
    names = {"layout", "columns", "template", "system", "where", "media_folder", "keep"}
    names |= {"format"} if ending == there.suffix else set()
    names |= {"tag"} if len({source.tag for source, _ in sources}) == 1 else set()
    return SourceSection(path=given, **first.model_dump(include=names, exclude_unset=True))


def told_apart(paths: Iterable[Path]) -> dict[Path, str]:
    """Each file's name, with as many of its folders as tell it from the others: `rows.jsonl`, or `a/rows.jsonl` and
    `b/rows.jsonl`."""
    found: dict[Path, str] = {}
    alike, parts = set(paths), 1
    while alike:
        ends = Counter(path.parts[-parts:] for path in alike)
        found |= {path: "/".join(path.parts[-parts:]) for path in alike if ends[path.parts[-parts:]] == 1}
        alike -= found.keys()
        parts += 1
    return found


def origins(files: Files) -> list[dict[str, Any]]:
    """What a manifest tells of the sources: which they were, the revision or query, and their files' names."""
    told: dict[int, dict[str, Any]] = {}
    called = told_apart(path for pairs in files.values() for _, path in pairs)
    for source, path in (pair for pairs in files.values() for pair in pairs):
        fields = (
            ("path", "hub", "subset", "split", "revision", "query", "tag") if source.hub else ("path", "query", "tag")
        )
        known = {name: value for name in fields if (value := getattr(source, name)) is not None}
        told.setdefault(id(source), known | {"files": []})["files"].append(called[path])
    return list(told.values())


def _files(source: SourceSection, folder: Path, key: str) -> list[tuple[SourceSection, Path]]:
    if source.hub is not None:
        from tunesmith.data.hub import fetch_set

        pinned, paths = fetch_set(source, f"{key}.hub")
        return [(pinned, path) for path in paths]
    if source.sql is not None:
        from tunesmith.data.database import run_query

        return [(source, run_query(source.sql, source.query or "", folder, f"{key}.sql"))]
    return [(source, path) for path in matching(source.path or "", folder, f"{key}.path")]


def matching(pattern: str, folder: Path, key: str) -> list[Path]:
    if is_url(pattern):
        from tunesmith.data.remote import fetch_url

        return fetch_url(pattern, key)
    expanded = Path(os.path.expandvars(pattern)).expanduser()
    whole = expanded if expanded.is_absolute() else folder / expanded
    paths = [whole] if whole.is_file() else [Path(p) for p in sorted(glob.glob(str(whole), recursive=True))]  # noqa: PTH207
    paths = [p for p in paths if p.is_file()]
    if not paths and whole.is_dir():
        raise DataError(f"is a folder: {whole}", where=key, fix="Name its files, for example with /*.jsonl at the end.")
    if not paths:
        unset = " ($ names a variable that is not set)" if "$" in str(expanded) else ""
        raise DataError(f"no such file: {whole}{unset}", where=key, fix="Paths are relative to the recipe's folder.")
    return paths


def lines_in(path: Path) -> int:
    """Line ends in a file: about its rows, for a progress bar."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))


def read_rows(source: SourceSection, path: Path, span: Span | None = None) -> Iterator[tuple[int, Row | Broken]]:
    """A file's rows as they are, by its format; or those of a span of it.

    Raises:
        DataError: the file is of no known format, damaged, or changed while it was read.
    """
    before = span.state if span else state_of(path)
    read = plugins.load("reader", format_of(path, source.format))
    yield from read(path, span) if span else read(path)
    if state_of(path) != before:
        raise DataError(
            "changed while it was read",
            where=str(path),
            fix="Run again once nothing writes to it; a copy taken first is safe.",
        )
