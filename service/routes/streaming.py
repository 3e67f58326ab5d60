"""Images as server-sent events, as OpenAI's Images API streams them."""

import asyncio
import base64
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import Request

from service.engine.base import Drawn, DrawRequest, EngineError, Preview
from service.errors import ApiError, error_body, logged
from service.routes import (
    client_of,
    drawing_info,
    engine_of,
    file_of,
    request_id_of,
    running_of,
    settings_of,
    size_of,
    told_facts,
)
from service.running import Cancelled, cancelled_error, wait_for
from service.schemas import CompletedImage, ImageRequest, PartialImage
from service.streaming import HEARTBEAT, Awaited, EventStream, server_sent

log = logging.getLogger(__name__)

Item = Preview | Drawn


async def stream_pictures(body: ImageRequest, wanted: DrawRequest, request: Request) -> EventStream:
    """Return the response once there is a first event, or once a heartbeat's time has passed without an error.

    Raises:
        ApiError: the client cancelled the request, or disconnected.
        EngineError: the engine refused the request, or failed.
    """
    heartbeat = settings_of(request).heartbeat_seconds
    async with AsyncExitStack() as stack:
        cancelled = stack.enter_context(running_of(request).enter(client_of(request), request_id_of(request)))
        # The protocol can only promise an AsyncIterator; engines promise that it can be closed.
        iterator = cast(AsyncGenerator[Item, None], engine_of(request).stream(wanted))
        items = Awaited(iterator)
        stack.push_async_callback(items.aclose)
        first = items.next()
        await wait_for(first, request, cancelled, heartbeat)
        if first.done():
            first.result()  # an error now still becomes an ordinary response
        frames = _frames(items, cancelled, heartbeat, _Events(body, settings_of(request).picture_metadata))
        return EventStream(frames, stack.pop_all())
    raise AssertionError("nothing here swallows an exception")


async def _frames(
    items: Awaited[Item], cancelled: Cancelled, heartbeat: float, events: "_Events"
) -> AsyncIterator[bytes]:
    """Yield each result as an event, a comment in each period of silence, and an error as the last event."""
    try:
        while True:
            coming = items.next()
            awaited: set[asyncio.Future[Any]] = {coming, cancelled}
            await asyncio.wait(awaited, timeout=heartbeat, return_when=asyncio.FIRST_COMPLETED)
            if cancelled.done():
                raise cancelled_error()
            if not coming.done():
                yield HEARTBEAT
                continue
            item = items.taken()
            if item is None:
                return
            yield await asyncio.to_thread(events.frame, item)
    except ApiError as error:
        yield _error_frame(error)
    except EngineError as error:
        yield _error_frame(logged(error))
    except Exception:
        log.exception("a stream failed")
        yield _error_frame(ApiError(500, "the server failed on this request; its log says why", code="internal_error"))


def _error_frame(error: ApiError) -> bytes:
    body = error_body(error.status_code, error.detail, error.param, error.code)
    return server_sent("error", json.dumps(body))


@dataclass(frozen=True)
class _Events:
    """Creates the events of one request."""

    body: ImageRequest
    metadata: bool
    """Whether a PNG records how it was generated."""
    _previews: Counter[int] = field(default_factory=Counter)
    """Number of previews of each image so far."""

    def frame(self, item: Item) -> bytes:
        """The result as an event. This encodes its image, so it must not run on the event loop."""
        facts = told_facts(self.body, item, self.metadata) if isinstance(item, Drawn) else None
        common = {
            "b64_json": base64.b64encode(file_of(self.body, item.image, facts)).decode("ascii"),
            "created_at": int(time.time()),
            "size": size_of(item.image),
            "output_format": self.body.output_format,
            "seed": item.seed,
            "picture_index": item.index,
        }
        event: PartialImage | CompletedImage
        if isinstance(item, Preview):
            index = self._previews[item.index]
            self._previews[item.index] += 1
            event = PartialImage(**common, partial_image_index=index, step=item.step, steps=item.steps)
        else:
            event = CompletedImage(**common, flagged=item.flagged or None, model=item.model, drawing=drawing_info(item))
        return server_sent(event.type, event.model_dump_json(exclude_none=True))
