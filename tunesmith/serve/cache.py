"""Answers that are given again: to requests that always have the same answer."""

from __future__ import annotations

import base64
import json
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from tunesmith import __version__
from tunesmith.errors import MachineError
from tunesmith.inference.served import TokenLogprob
from tunesmith.serve.asked import Call, Delta
from tunesmith.serve.section import CacheSection

PREFIX = f"tunesmith:{__version__}:answer:"


class Cache(Protocol):
    """Keeps bytes by key, for a while."""

    async def get(self, key: str) -> bytes | None: ...

    async def put(self, key: str, value: bytes) -> None: ...


def cache(section: CacheSection) -> Cache:
    return InRedis(section) if section.redis else InMemory(section)


class InMemory:
    """The answers used last, up to so many bytes."""

    def __init__(self, section: CacheSection) -> None:
        self._most, self._seconds, self._size = section.megabytes << 20, section.seconds, 0
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    async def get(self, key: str) -> bytes | None:
        kept = self._kept.get(key)
        if kept is None:
            return None
        if kept[0] < time.monotonic():
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return kept[1]

    async def put(self, key: str, value: bytes) -> None:
        if key in self._kept:
            self._drop(key)
        self._kept[key] = (time.monotonic() + self._seconds, value)
        self._size += len(value)
        while self._size > self._most:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        self._size -= len(self._kept.pop(key)[1])


class InRedis:
    """Redis, shared by several servers. Where it does not answer, nothing is kept and everything is answered anew."""

    def __init__(self, section: CacheSection) -> None:
        try:
            from redis import asyncio as redis
        except ImportError as error:
            raise MachineError(
                "needs redis, which is not installed", where="serve.cache.redis", fix="pip install 'tunesmith[redis]'"
            ) from error
        assert section.redis is not None
        self._seconds = int(section.seconds)
        self._redis = redis.from_url(section.redis, socket_timeout=1, socket_connect_timeout=1)

    async def get(self, key: str) -> bytes | None:
        from redis.exceptions import RedisError

        try:
            found: Any = await self._redis.get(PREFIX + key)
        except (RedisError, OSError):
            return None
        return bytes(found) if found is not None else None

    async def put(self, key: str, value: bytes) -> None:
        from redis.exceptions import RedisError

        try:
            await self._redis.set(PREFIX + key, value, ex=self._seconds)
        except (RedisError, OSError):
            return


def packed(deltas: Sequence[Delta]) -> bytes:
    """An answer as JSON."""

    def plain(value: Any) -> Any:
        return {"b64": base64.b64encode(value).decode()} if isinstance(value, bytes) else value

    return json.dumps([asdict(d) for d in deltas], default=plain).encode()


def unpacked(kept: bytes) -> list[Delta]:
    """What `packed` was given."""

    def likely(found: dict[str, Any]) -> TokenLogprob:
        return TokenLogprob(
            found["id"],
            base64.b64decode(found["data"]["b64"]),
            found["logprob"],
            tuple(map(likely, found["top"])),
        )

    def delta(found: dict[str, Any]) -> Delta:
        tokens = {key: tuple(map(likely, found[key])) for key in ("logprobs", "prompt")}
        return Delta(**found | tokens | {"calls": tuple(Call(**c) for c in found["calls"])})

    return [delta(found) for found in json.loads(kept)]
