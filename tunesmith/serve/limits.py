"""How much a key may ask: requests a minute, and tokens a day. Counted in memory, or in Redis for several servers."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.serve.asked import Refused
from tunesmith.serve.section import LimitsSection

log = logging.getLogger("tunesmith.serve")


class Limits:
    """Counts what keys ask for."""

    def __init__(self, section: LimitsSection) -> None:
        try:
            from limits import RateLimitItemPerDay, RateLimitItemPerMinute
            from limits.aio.strategies import FixedWindowRateLimiter, MovingWindowRateLimiter
            from limits.storage import storage_from_string
        except ImportError as error:
            raise MachineError(
                f"needs {error.name}, which is not installed",
                where="serve.limits",
                fix="pip install 'tunesmith[serve]'",
            ) from error
        self._minute, self._day = RateLimitItemPerMinute, RateLimitItemPerDay
        where = f"async+{section.redis}" if section.redis else "async+memory://"
        options = {"implementation": "redispy"} if section.redis else {}
        storage: Any = storage_from_string(where, wrap_exceptions=True, **options)
        self._requests, self._tokens = MovingWindowRateLimiter(storage), FixedWindowRateLimiter(storage)
        self._section = section

    async def enter(self, key: str, rpm: int | None = None) -> None:
        """Count a request; `rpm` is the key's own limit. Where Redis does not answer, nothing is limited.

        Raises:
            Refused: it is one too many; says when to come again.
        """
        most, quota = rpm or self._section.requests_per_minute, self._section.tokens_per_day
        with self._unless_down():
            if most and not await self._requests.hit(self._minute(most), key):
                window = await self._requests.get_window_stats(self._minute(most), key)
                raise _late(f"Rate limit reached: {most} requests a minute.", "rate_limit_exceeded", window.reset_time)
            if quota and not await self._tokens.test(self._day(quota), key):
                window = await self._tokens.get_window_stats(self._day(quota), key)
                raise _late(f"Token quota reached: {quota} tokens a day.", "insufficient_quota", window.reset_time)

    async def spend(self, key: str, tokens: int) -> None:
        """Count an answer's tokens."""
        quota = self._section.tokens_per_day
        if quota and tokens:
            with self._unless_down():
                await self._tokens.hit(self._day(quota), key, cost=tokens)

    @contextlib.contextmanager
    def _unless_down(self) -> Iterator[None]:
        from limits.errors import StorageError

        try:
            yield
        except StorageError as error:
            log.warning("requests are not counted: %s", error)


def _late(message: str, code: str, until: float) -> Refused:
    return Refused(message, status=429, code=code, retry_after=max(1, math.ceil(until - time.time())))
