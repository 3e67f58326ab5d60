"""Requests that are being answered: their clients can cancel them, or go away."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request

from service.errors import CLIENT_CLOSED_REQUEST, ApiError


class Running:
    """What is being drawn, by client and id. For the event loop alone."""

    def __init__(self) -> None:
        self._requests: defaultdict[tuple[str, str], set[asyncio.Event]] = defaultdict(set)

    @contextmanager
    def enter(self, client: str, request_id: str) -> Iterator[asyncio.Event]:
        """The event that is set once the client cancels this request, which is known for as long as the context lasts.

        An id that is in use already is no error, since a proxy that tries again may send it twice: both are cancelled.
        """
        key, cancelled = (client, request_id), asyncio.Event()
        self._requests[key].add(cancelled)
        try:
            yield cancelled
        finally:
            self._requests[key].discard(cancelled)
            if not self._requests[key]:
                del self._requests[key]

    def cancel(self, client: str, request_id: str) -> bool:
        """Cancel all that this client has running under the id; False where that is nothing."""
        events = self._requests.get((client, request_id), ())
        for cancelled in events:
            cancelled.set()
        return bool(events)

    def __len__(self) -> int:
        return sum(map(len, self._requests.values()))


async def wait_for(
    work: "asyncio.Future[Any]", request: Request, cancelled: asyncio.Event, seconds: float | None = None
) -> None:
    """Return once the work is done, or after so many seconds. It goes on either way: who has begun it must end it.

    Raises:
        ApiError: the client has cancelled the request, or has gone.
    """
    stopped = asyncio.create_task(cancelled.wait())
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, stopped, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return
        if stopped.done():
            raise cancelled_error()
        if gone.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client has gone", code="client_closed_request")
    finally:
        stopped.cancel()
        gone.cancel()
        await asyncio.gather(stopped, gone, return_exceptions=True)


def cancelled_error() -> ApiError:
    """The answer to a request that its client has cancelled."""
    return ApiError(CLIENT_CLOSED_REQUEST, "the request was cancelled", code="cancelled")


async def _disconnected(request: Request) -> None:
    """Returns when the client has closed the connection. The body was read before, so nothing else comes."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
