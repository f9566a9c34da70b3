"""How much a key may ask: requests a minute, and tokens a day. Counted in memory, or in Redis for several servers."""

from __future__ import annotations

import math
import time
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.serve.asked import Refused
from tunesmith.serve.section import LimitsSection


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
        storage: Any = storage_from_string(where, **options)
        self._requests, self._tokens = MovingWindowRateLimiter(storage), FixedWindowRateLimiter(storage)
        self._section = section

    async def enter(self, key: str, rpm: int | None = None) -> None:
        """Count a request; `rpm` is the key's own limit.

        Raises:
            Refused: it is one too many; says when to come again.
        """
        most = rpm or self._section.requests_per_minute
        if most and not await self._requests.hit(self._minute(most), key):
            window = await self._requests.get_window_stats(self._minute(most), key)
            raise Refused(
                f"Rate limit reached: {most} requests a minute.",
                status=429,
                code="rate_limit_exceeded",
                retry_after=_until(window.reset_time),
            )
        quota = self._section.tokens_per_day
        if quota and not await self._tokens.test(self._day(quota), key):
            window = await self._tokens.get_window_stats(self._day(quota), key)
            raise Refused(
                f"Token quota reached: {quota} tokens a day.",
                status=429,
                code="insufficient_quota",
                retry_after=_until(window.reset_time),
            )

    async def spend(self, key: str, tokens: int) -> None:
        """Count an answer's tokens."""
        quota = self._section.tokens_per_day
        if quota and tokens:
            await self._tokens.hit(self._day(quota), key, cost=tokens)


def _until(moment: float) -> int:
    return max(1, math.ceil(moment - time.time()))
