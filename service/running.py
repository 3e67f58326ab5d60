"""Requests in progress, which their clients may cancel or abandon."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Request

from service.errors import CLIENT_CLOSED_REQUEST, ApiError

Cancelled = asyncio.Future[None]
"""Done once the client has cancelled its request."""


class Running:
    """The requests in progress, by client and id. Used only on the event loop."""

    def __init__(self) -> None:
        self._requests: defaultdict[tuple[str, str], set[Cancelled]] = defaultdict(set)

    @contextmanager
    def enter(self, client: str, request_id: str) -> Iterator[Cancelled]:
        """Register a request for the duration of the block; the future is done once the client cancels it.

        An id that is already in use is not an error, since a proxy may retry a request: cancelling it cancels both.
        """
        key, cancelled = (client, request_id), asyncio.get_running_loop().create_future()
        self._requests[key].add(cancelled)
        try:
            yield cancelled
        finally:
            self._requests[key].discard(cancelled)
            if not self._requests[key]:
                del self._requests[key]

    def cancel(self, client: str, request_id: str) -> bool:
        """Cancel all requests that this client has in progress under the id; return whether there were any."""
        found = self._requests.get((client, request_id), ())
        for cancelled in found:
            if not cancelled.done():
                cancelled.set_result(None)
        return bool(found)

    def __len__(self) -> int:
        return sum(map(len, self._requests.values()))


async def wait_for(
    work: "asyncio.Future[Any]", request: Request, cancelled: Cancelled, seconds: float | None = None
) -> None:
    """Return once the work is done, or after ``seconds``. The work goes on in any case: its creator must end it.

    Raises:
        ApiError: the client has cancelled the request, or disconnected.
    """
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait({work, cancelled, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return
        if cancelled.done():
            raise cancelled_error()
        if gone.done():
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client disconnected", code="client_closed_request")
    finally:
        gone.cancel()  # not awaited, which would delay every response by two rounds of the event loop


def cancelled_error() -> ApiError:
    """The response to a request that its client has cancelled."""
    return ApiError(CLIENT_CLOSED_REQUEST, "the request was cancelled", code="cancelled")


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected. The body has been read already, so nothing else can arrive."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
