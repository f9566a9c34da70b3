"""Many streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from tunesmith.serve.asked import Refused

T = TypeVar("T")
END = object()


async def merged(streams: Sequence[AsyncGenerator[T, None]], at_once: int) -> AsyncGenerator[T, None]:
    """What several streams give, as it comes, `at_once` of them at a time.

    What they give is kept until it is fetched, so a slow reader never holds a model's slot. Closing closes them all.
    """
    queue: asyncio.Queue[Any] = asyncio.Queue()
    waiting = iter(streams)

    async def pump() -> None:
        for stream in waiting:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)

    async def all_of_them() -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(at_once, len(streams))):
                    group.create_task(pump())
            queue.put_nowait(END)
        except BaseExceptionGroup as errors:
            queue.put_nowait(_first(errors))
        except asyncio.CancelledError:
            raise
        finally:
            for stream in waiting:  # those that had not begun
                await stream.aclose()

    worker = asyncio.create_task(all_of_them())
    try:
        while (item := await queue.get()) is not END:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def within(seconds: float, stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """A stream that must have ended in time.

    Raises:
        Refused: it has not.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    async with aclosing(stream):
        while True:
            try:
                async with asyncio.timeout_at(end):
                    item = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise late(seconds) from None
            yield item


def late(seconds: float) -> Refused:
    return Refused(f"The answer was not ready within {seconds:g} seconds.", status=504, code="deadline_exceeded")


async def primed(stream: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The stream once its first item is there, so that what goes wrong at first is raised here."""
    try:
        first = [await anext(stream)]
    except StopAsyncIteration:
        first = []
    except BaseException:
        await stream.aclose()
        raise

    async def rest() -> AsyncGenerator[T, None]:
        async with aclosing(stream):
            for item in first:
                yield item
            async for item in stream:
                yield item

    return rest()
