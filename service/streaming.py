"""Server-sent events: their form, and an answer that sends them for as long as somebody reads."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import Generic, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

HEARTBEAT = b": still at work\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Nobody keeps an event for later: no cache, and not nginx."""


def server_sent(event: str, data: str) -> bytes:
    """One event; its data is one line, such as JSON."""
    return f"event: {event}\ndata: {data}\n\n".encode()


class Awaited(Generic[T]):
    """An iterator whose next item can be waited for again and again: a wait that gives up loses nothing.

    Close it, whatever happened: that closes the iterator within, also where its next item is still being made.
    """

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self._items = items
        self._next: asyncio.Task[T | None] | None = None

    def next(self) -> "asyncio.Task[T | None]":
        """The task that makes the next item, or None behind the last: the same one until its result was taken."""
        if self._next is None:
            self._next = asyncio.create_task(self._advance())
        return self._next

    def taken(self) -> T | None:
        """The result of a task that is done; the next call of `next` makes another."""
        assert self._next is not None
        task, self._next = self._next, None
        return task.result()

    async def aclose(self) -> None:
        """Stop, by cancelling what the iterator is at."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._items.aclose()

    async def _advance(self) -> T | None:
        return await anext(self._items, None)


class EventStream(StreamingResponse):
    """An answer of server-sent events; what they come from is closed at the end, or as soon as the client has gone.

    Args:
        frames: what to send.
        sources: closed when the answer is over, in whatever way: frames that were never asked for can close nothing.
    """

    def __init__(self, frames: AsyncIterator[bytes], sources: AsyncExitStack) -> None:
        super().__init__(frames, media_type="text/event-stream", headers=HEADERS)
        self._sources = sources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._sources:
            await super().__call__(scope, receive, send)
