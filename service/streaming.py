"""Server-sent events: their format, and a response that sends them for as long as the client reads."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import Generic, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

HEARTBEAT = b": still at work\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Prevents caches from storing the stream, and nginx from buffering it."""


def server_sent(event: str, data: str) -> bytes:
    """Format one event; its data must be a single line, such as JSON."""
    return f"event: {event}\ndata: {data}\n\n".encode()


class Awaited(Generic[T]):
    """An iterator whose next item can be awaited repeatedly: a wait that times out loses nothing.

    It must be closed in any case; this closes the underlying iterator, even if its next item is still being produced.
    """

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self._items = items
        self._next: asyncio.Task[T | None] | None = None

    def next(self) -> "asyncio.Task[T | None]":
        """The task for the next item, or None after the last. It stays the same until its result is taken."""
        if self._next is None:
            self._next = asyncio.create_task(self._advance())
        return self._next

    def taken(self) -> T | None:
        """Take the result of the finished task; the following call of `next` starts another."""
        assert self._next is not None
        task, self._next = self._next, None
        return task.result()

    async def aclose(self) -> None:
        """Cancel the pending task, and close the iterator."""
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)
        await self._items.aclose()

    async def _advance(self) -> T | None:
        return await anext(self._items, None)


class EventStream(StreamingResponse):
    """A response of server-sent events, whose sources are closed at its end or as soon as the client disconnects.

    Args:
        frames: what to send.
        sources: closed however the response ends. The frames cannot do this, since they may never be iterated.
    """

    def __init__(self, frames: AsyncIterator[bytes], sources: AsyncExitStack) -> None:
        super().__init__(frames, media_type="text/event-stream", headers=HEADERS)
        self._sources = sources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._sources:
            await super().__call__(scope, receive, send)
