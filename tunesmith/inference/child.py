"""A process of ours that holds a model: told what to do in one line, watched, and never outliving us."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from shutil import rmtree
from typing import Any, Self

from tunesmith.errors import MachineError, ModelError, TunesmithError

KINDS = {kind.__name__: kind for kind in (MachineError, ModelError)}
LINE = 2**24  # bytes that one message may have
LAST_WORDS = 20  # lines


class Child:
    """A running host module (`tunesmith/inference/host.py` is its side).

    Attributes:
        ready: what it told of itself once its model was loaded.
        users: requests that it is answering.
        ended: a task that is done when the process has ended.
    """

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.process, self.folder = process, folder
        self.ready: dict[str, Any] = {}
        self.users = 0
        self._idle = asyncio.Event()
        self._words: deque[str] = deque(maxlen=LAST_WORDS)
        self._listener = asyncio.create_task(self._listen())
        self.ended = asyncio.create_task(process.wait())

    @classmethod
    async def start(cls, module: str, told: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Self:
        """Start `python -m module`, tell it, and wait until it says that it is ready.

        A folder of its own, for sockets, is among what it is told.

        Raises:
            MachineError, ModelError: as the child told it, or with its last words where it ended without one.
        """
        folder = Path(tempfile.mkdtemp(prefix="tunesmith-"))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LINE,
            start_new_session=True,  # an interrupt in the terminal lets us finish streams first
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **(environment or {})},
        )
        child = cls(process, folder)
        try:
            await child.tell({**told, "folder": str(folder)})
            child.ready = await child._first()
        except BaseException:
            await child.end(patience=0)
            raise
        return child

    async def tell(self, message: Mapping[str, Any]) -> None:
        """Send one line. Nothing happens where the process has ended: who waits for its answer hears of that."""
        assert self.process.stdin
        with contextlib.suppress(ConnectionError, BrokenPipeError, RuntimeError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            await self.process.stdin.drain()

    async def hear(self) -> dict[str, Any] | None:
        """The next message; None once the process has ended. One that can't be understood is killed."""
        assert self.process.stdout
        with contextlib.suppress(ConnectionError):
            try:
                line = await self.process.stdout.readline()
                if line.endswith(b"\n"):  # else cut short by its end
                    message: dict[str, Any] = json.loads(line)
                    return message
            except ValueError as error:  # longer than a message may be, or no JSON
                self._words.append(f"what it said can't be read: {error}")
                self._kill()
        return None

    def take(self) -> None:
        self.users += 1
        self._idle.clear()

    def give(self) -> None:
        self.users -= 1
        if not self.users:
            self._idle.set()

    async def drained(self) -> None:
        """Wait until nothing is asked of it, or it has ended."""
        if self.users:
            waits = [asyncio.create_task(self._idle.wait()), self.ended]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            waits[0].cancel()

    async def end(self, patience: float = 5.0) -> None:
        """Ask it to end, and kill it where it does not within `patience` seconds."""
        if self.process.stdin:
            self.process.stdin.close()
        if not patience or not (await asyncio.wait([self.ended], timeout=patience))[0]:
            self._kill()
        await asyncio.wait([self.ended])
        self._listener.cancel()
        rmtree(self.folder, ignore_errors=True)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    @property
    def last_words(self) -> str:
        return "\n".join(self._words)

    async def _first(self) -> dict[str, Any]:
        while (message := await self.hear()) is not None:
            if "error" in message:
                told = message["error"]
                kind: type[TunesmithError] = KINDS.get(told["type"], ModelError)
                raise kind(told["what"], where=told["where"], fix=told["fix"])
            if "ready" in message:
                found: dict[str, Any] = message["ready"]
                return found
        await self.ended
        await asyncio.wait([self._listener], timeout=1)
        words = f":\n{self.last_words}" if self._words else ""
        raise ModelError(
            f"the engine's process ended while it loaded the model (code {self.process.returncode}){words}",
            fix="Check that the machine has the memory for it; a smaller context or fewer slots take less.",
        )

    async def _listen(self) -> None:
        """Keep the last lines that it wrote for people."""
        assert self.process.stderr
        with contextlib.suppress(ValueError, ConnectionError):
            async for line in self.process.stderr:
                self._words.append(line.decode("utf-8", "replace").rstrip())
