"""Sources that are not on this disk -> files in the cache, by their content.

A file's place in the cache is named by the hash of what it holds, so that what a stage was made from can't
change under it, and what came once in the same state is not fetched again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from tunesmith.errors import DataError, MachineError, first_line
from tunesmith.models.resolve import cache_folder
from tunesmith.progress import bar
from tunesmith.runs import hash_file, need_room, write_json

WAITS = (0.5, 2.0, 5.0)  # seconds before each further try
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, ImportError, ValueError, NotImplementedError)
STATES = ("ETag", "etag", "md5", "Content-MD5", "LastModified", "Last-Modified", "mtime", "updated", "created")
T = TypeVar("T")


def fetch_url(url: str, key: str) -> list[Path]:
    """The files behind an fsspec URL (https://, s3://, gs://, ...; `*` where the protocol can list), in order of name.

    Raises:
        DataError: nothing is there, it may not be read, or it broke off on every try.
        MachineError: the protocol's package is not installed, or the disk is full.
    """
    with _told(url, key):
        from fsspec.core import url_to_fs

        fs, root = url_to_fs(os.path.expandvars(url))
        fs.invalidate_cache()  # of what is there: files may have changed since this process last looked
        names = sorted(_again(lambda: fs.glob(root))) if "*" in root else [root]
        if not names:
            raise FileNotFoundError(root)
        return [_one(fs, str(name), str(fs.unstrip_protocol(name))) for name in names]


def _one(fs: Any, name: str, url: str) -> Path:
    info = _again(lambda: fs.info(name))
    if info.get("type") == "directory":
        raise IsADirectoryError(name)
    state = {k: str(info[k]) for k in STATES if info.get(k)} | {"size": info.get("size")}
    memory = cache_folder() / "sources" / "fetched.json"
    known = _remembered(memory)
    there = Path(known.get(url, {}).get("path", ""))
    if len(state) > 1 and known.get(url, {}).get("state") == state and there.is_file():
        return there
    size = info.get("size")
    need_room(
        cache_folder(), size or 0, f"Fetching {Path(urlsplit(url).path).name}", "Free some, or set TUNESMITH_CACHE."
    )

    def download() -> Path:
        with keeping(file_name(url)) as kept, bar(f"Fetching {file_name(url)}"[:40], size) as progress:
            with fs.open(name, "rb") as source:
                while piece := source.read(2**20):
                    kept.file.write(piece)
                    progress.advance(len(piece))
            if size is not None and kept.file.tell() < size:
                raise ConnectionError(f"{kept.file.tell():,} of {size:,} bytes came")
        return kept.path

    path = _again(download)
    write_json(memory, _remembered(memory) | {url: {"state": state, "path": str(path)}})
    return path


@dataclass
class Kept:
    """A file that is being written, and afterwards its place in the cache."""

    file: IO[bytes]
    path: Path = field(default_factory=Path)


@contextlib.contextmanager
def keeping(name: str) -> Iterator[Kept]:
    """A file to write; once the block is through it lies in the cache, under the hash of its content."""
    folder = cache_folder() / "sources"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / name
        with path.open("wb") as file:
            kept = Kept(file)
            yield kept
        kept.path = folder / hash_file(path)[:16] / name
        kept.path.parent.mkdir(exist_ok=True)
        path.replace(kept.path)


def file_name(url: str) -> str:
    """The last part of a URL's path, as a name that any disk takes and that can't lead elsewhere."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", Path(urlsplit(url).path).name).lstrip(".")[-100:] or "source"


def _remembered(memory: Path) -> dict[str, Any]:
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _again(work: Callable[[], T]) -> T:
    """Do something that a network may break off, and do it anew where it did."""
    for wait in WAITS:
        try:
            return work()
        except FINAL as error:
            if _status(error) in (None, 404, 410):
                raise
            if _status(error) in (401, 403):
                raise PermissionError(f"the server answers {_status(error)}") from error
            time.sleep(wait)
        except Exception as error:  # each protocol's library raises its own
            if isinstance(error, DataError | MachineError) or getattr(error, "errno", None) == errno.ENOSPC:
                raise
            time.sleep(wait)
    return work()


def _status(error: BaseException) -> int | None:
    """What an HTTP server answered, behind the "file not found" that fsspec makes of any answer; 0: none at all."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return None
    return int(getattr(cause, "status", 0) or 0)


@contextlib.contextmanager
def _told(url: str, key: str) -> Iterator[None]:
    """Whatever a protocol's library raises, as a sentence."""
    shown = re.sub(r"//[^/@]*@", "//", url)
    try:
        yield
    except (DataError, MachineError):
        raise
    except ImportError as error:
        raise MachineError(
            f"{urlsplit(url).scheme}:// needs a package that is not installed ({first_line(error)})",
            where=key,
            fix="Install it: pip install 'tunesmith[remote]' (https, s3) or 'tunesmith[gcs]' (gs).",
        ) from error
    except FileNotFoundError as error:
        if _status(error) not in (None, 404, 410):
            raise _failed(shown, key, error.__cause__ or error) from error
        raise DataError(f"nothing is at {shown}", where=key, fix="Check the address.") from error
    except PermissionError as error:
        raise DataError(
            f"may not be read: {shown} ({first_line(error)})", where=key, fix="Check the credentials of this machine."
        ) from error
    except IsADirectoryError as error:
        raise DataError(
            f"is a folder: {shown}", where=key, fix="Name its files, as with /*.jsonl at the end."
        ) from error
    except ValueError as error:
        raise DataError(
            f"is no address that can be read: {shown} ({first_line(error)})",
            where=key,
            fix="Known: https://, s3://, gs:// and what else fsspec has.",
        ) from error
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise MachineError(
                "the disk is full",
                where=str(cache_folder()),
                fix="Free some room, or set TUNESMITH_CACHE to another place.",
            ) from error
        raise _failed(shown, key, error) from error


def _failed(shown: str, key: str, error: BaseException) -> DataError:
    return DataError(
        f"could not be fetched, {len(WAITS) + 1} tries: {shown} ({type(error).__name__}: {first_line(error)})",
        where=key,
        fix="Try again later, or fetch the file yourself and name it by its path.",
    )
