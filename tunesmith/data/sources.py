"""A recipe's sources -> the files that hold their rows, and those files' rows."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from tunesmith import plugins
from tunesmith.data.readers import Broken, Row
from tunesmith.data.section import DataSection, SourceSection
from tunesmith.errors import DataError


def source_files(section: DataSection, folder: Path) -> dict[str, list[tuple[SourceSection, Path]]]:
    """The files of each part. `train` holds everything that is still to be split.

    Raises:
        DataError: a path that matches no file.
    """
    found: dict[str, list[tuple[SourceSection, Path]]] = {"train": [], "validation": [], "test": []}
    for number, source in enumerate(section.sources):
        found["train"] += [(source, path) for path in _paths(source.path, folder, f"data.sources.{number}.path")]
    for part in ("validation", "test"):
        given = getattr(section.split, part)
        if isinstance(given, str):
            like = section.sources[0].model_copy(update={"path": given, "format": "auto"})
            found[part] = [(like, path) for path in _paths(given, folder, f"data.split.{part}")]
    return found


def _paths(pattern: str, folder: Path, key: str) -> list[Path]:
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


def read_rows(source: SourceSection, path: Path) -> Iterator[tuple[int, Row | Broken]]:
    """A file's rows as they are, by its format."""
    suffixes = [s.lstrip(".").lower() for s in path.suffixes if s.lower() != ".gz"]
    name = source.format if source.format != "auto" else (suffixes[-1] if suffixes else "")
    if name not in plugins.known("reader"):
        raise DataError(
            f"files that end in '.{name}' are not read",
            where=str(path),
            fix=f"Name its format (data.sources[].format): {', '.join(sorted(plugins.known('reader')))}.",
        )
    yield from plugins.load("reader", name)(path)
