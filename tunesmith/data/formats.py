"""Which reader a file wants: by the recipe, by its ending, else by what it begins with."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tunesmith import plugins
from tunesmith.data.labelstudio import is_task
from tunesmith.data.opening import endings, opened, state_of
from tunesmith.data.readers import load_file, load_json
from tunesmith.errors import DataError

LOOKED_AT = 4096
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"%PDF-": "pdf"}
PICKLES = ("pkl", "pickle", "pt", "pth", "joblib", "npy", "npz")
ARCHIVES = ("zip", "tar", "tgz", "7z", "rar", "bz2", "xz")


def format_of(path: Path, named: str = "auto") -> str:
    """The name of a reader.

    Raises:
        DataError: nothing reads such a file.
    """
    if named != "auto":
        return named
    last = (endings(path) or [""])[-1]
    if last == "json" and _is_label_studio(path):
        return "label_studio"
    if last in plugins.known("reader"):
        return last
    if last in PICKLES:
        raise DataError(
            "is a pickle, which can run code when it is opened, and is never read",
            where=str(path),
            fix="Save its rows as JSONL or Parquet.",
        )
    if last in ARCHIVES:
        raise DataError(
            "is an archive, which is not unpacked",
            where=str(path),
            fix="Unpack it, and name the files in it; .gz and .zst files are read as they are.",
        )
    found = _by_content(path)
    if found is None:
        raise DataError(
            f"files that end in '.{last}' are not read",
            where=str(path),
            fix=f"Name its format (data.sources[].format): {', '.join(sorted(plugins.known('reader')))}.",
        )
    return found


def _by_content(path: Path) -> str | None:
    with opened(path) as file:
        start = file.read(LOOKED_AT)
    for magic, name in MAGIC.items():
        if start.startswith(magic):
            return name
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # not merely a character cut in two
            return None
        text = start[: error.start].decode("utf-8-sig")
    if "\x00" in text:
        return None
    first = text.lstrip()[:1]
    if first == "[":
        return "json"
    return "jsonl" if first == "{" and _is_object(text.lstrip().split("\n")[0]) else "txt"


def _is_object(line: str) -> bool:
    try:
        return isinstance(load_json(line), dict)
    except (ValueError, RecursionError):
        return False


def _is_label_studio(path: Path) -> bool:
    """Whether the first task of a JSON file is one of Label Studio's; its first bytes must name both parts."""
    with opened(path) as file:
        start = file.read(2**16)
    return b'"annotations"' in start and b'"data"' in start and _has_task(path, state_of(path))


@lru_cache(64)
def _has_task(path: Path, state: tuple[int, int, int]) -> bool:
    """Asked of a file whenever it is read; answered once, until it changes."""
    try:
        value, _ = load_file(path)
    except DataError:  # for the reader to tell
        return False
    return isinstance(value, list) and any(is_task(row) for row in value[:50])
