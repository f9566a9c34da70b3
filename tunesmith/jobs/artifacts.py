"""Files and models, kept under names of our own on any fsspec file system."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import MachineError, first_line

KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
CHUNK = 1 << 20


class TooLarge(ValueError):
    """More bytes came than may."""


class Artifacts:
    """A place for bytes. A key's content appears when it is whole, or not at all.

    Args:
        url: any fsspec URL, or a folder.
        cache: a folder of this machine, for what must be read as files and lies elsewhere.
    """

    def __init__(self, url: str, cache: Path) -> None:
        import fsspec

        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
            self.local = "file" in (self.files.protocol if isinstance(self.files.protocol, tuple) else ())
            self.files.makedirs(self.root, exist_ok=True)
        except (ImportError, ValueError, OSError) as error:
            raise MachineError(
                f"can't be used for artifacts ({first_line(error)})",
                where=url,
                fix="Give a folder or an fsspec URL, and install what it needs: pip install 'tunesmith[remote]'",
            ) from error
        self.cache = cache

    def _at(self, key: str) -> str:
        if not KEY.fullmatch(key):
            raise ValueError(f"not an artifact's key: {key!r}")
        return f"{self.root.rstrip('/')}/{key}"

    def put(self, key: str, content: IO[bytes], most: int | None = None) -> tuple[int, str]:
        """Keep some bytes; returns how many, and their SHA-256.

        Raises:
            TooLarge: there are more than `most`.
            OSError: as the disk says it, as when it is full. Nothing is left then.
        """
        place, count, hash = self._at(key), 0, hashlib.sha256()
        temporary = f"{self.root.rstrip('/')}/.{uuid.uuid4().hex}" if self.local else place
        self._parent(place)
        try:
            with self.files.open(temporary, "wb") as file:
                while chunk := content.read(CHUNK):
                    count += len(chunk)
                    if most is not None and count > most:
                        raise TooLarge(f"more than {most:,} bytes")
                    hash.update(chunk)
                    file.write(chunk)
            if self.local:
                Path(temporary).replace(place)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                self.files.rm(temporary)
            raise
        return count, hash.hexdigest()

    def _parent(self, place: str) -> None:
        """Make the folder above a place, for file systems that have folders."""
        with contextlib.suppress(FileExistsError, PermissionError, NotImplementedError):
            self.files.makedirs(place.rpartition("/")[0], exist_ok=True)

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[IO[Any]]:
        with self.files.open(self._at(key), "rb") as file:
            yield file

    def path(self, key: str) -> Path:
        """A key's file or folder as a path of this machine, fetched where it lies elsewhere."""
        place = self._at(key)
        if self.local:
            return Path(place)
        there = self.cache / key
        if not there.exists():
            there.parent.mkdir(parents=True, exist_ok=True)
            temporary = there.with_name(f".{there.name}.{uuid.uuid4().hex}")
            if self.files.isdir(place):
                for found in self.files.find(place):
                    target = temporary / found[len(place) :].lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self.files.get_file(found, str(target))
            else:
                self.files.get_file(place, str(temporary))
            try:
                temporary.replace(there)
            except OSError:  # another process was faster
                shutil.rmtree(temporary, ignore_errors=True)
        return there

    def put_folder(self, key: str, folder: Path) -> None:
        """Keep a folder, in place of what is there."""
        place = self._at(key)
        if not self.local:
            self.delete(key)
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                there = f"{place}/{path.relative_to(folder).as_posix()}"
                self._parent(there)
                self.files.put_file(str(path), there)
            return
        temporary = Path(f"{self.root.rstrip('/')}/.{uuid.uuid4().hex}")
        try:
            shutil.copytree(folder, temporary)
            shutil.rmtree(place, ignore_errors=True)
            Path(place).parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def delete(self, key: str) -> None:
        """Remove a key's content, here and from this machine's cache."""
        with contextlib.suppress(FileNotFoundError):
            self.files.rm(self._at(key), recursive=True)
        cached = self.cache / key
        shutil.rmtree(cached, ignore_errors=True) if cached.is_dir() else cached.unlink(missing_ok=True)


def file_key(id: str) -> str:
    return f"files/{id}"


def part_key(upload: str, part: str) -> str:
    return f"uploads/{upload}/{part}"


def model_key(job: str, step: int | None = None) -> str:
    return f"models/{job}/{'final' if step is None else f'step-{step}'}"


def run_key(job: str) -> str:
    return f"runs/{job}.tar"
