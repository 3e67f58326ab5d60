"""Tracks every request: its id, access log line, metrics and span, and the response if a bug ends it."""

import logging
import time
from contextlib import AbstractContextManager, nullcontext

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.access import ANONYMOUS
from service.errors import CLIENT_CLOSED_REQUEST, SHOWN, bug
from service.metrics import Metrics
from service.spans import End, Spans

log = logging.getLogger("service.access")
HEADER = "X-Request-ID"
PICTURES = "/v1/images/files/"
"""All that is logged of such a path: an image's id gives access to it, so it must not be logged, like a key."""
QUIET = ("/health", "/metrics")
"""Paths that are polled by machines, and are logged at level debug."""


class Tracking:
    """ASGI middleware, the outermost one.

    Args:
        app: handles the requests.
        metrics: counts the responses.
        spans: creates a span of each request; None creates none.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, spans: Spans | None) -> None:
        self.app = app
        self.metrics = metrics
        self.spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = logs.choose_id(Headers(scope=scope).get(HEADER))
        # Never reset: the server logs a bug after this returns, in the same context, which belongs to this request.
        logs.request_id.set(request_id)
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started = time.perf_counter()
        status = CLIENT_CLOSED_REQUEST
        begun = False

        async def with_id(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with self._span(scope, request_id) as end:
            try:
                await self.app(scope, receive, with_id)
            except Exception:
                # Sent here so that it has the request id: Starlette's own handler is outside of this middleware.
                if not begun:
                    await bug(request_id)(scope, receive, with_id)
                raise
            finally:
                self._record(scope, status, time.perf_counter() - started, end)

    def _span(self, scope: Scope, request_id: str) -> AbstractContextManager[End | None]:
        return nullcontext() if self.spans is None else self.spans.request(scope, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, end: End | None) -> None:
        method, route = scope["method"], getattr(scope.get("route"), "path_format", None)
        client = scope["state"].get("client", ANONYMOUS.id)
        self.metrics.answered(method, route, status, seconds)
        if end is not None:
            end(route, client, status)
        path = PICTURES if scope["path"].startswith(PICTURES) else scope["path"]
        fields = {
            "method": method,
            "path": path if len(path) <= SHOWN else path[:SHOWN] + "...",
            "status": status,
            "seconds": round(seconds, 4),
            "client": client,
        }
        level = logging.DEBUG if scope["path"].startswith(QUIET) else logging.INFO
        log.log(
            level, "%(method)s %(path)r %(status)d %(seconds).3f s client=%(client)s", fields, extra={"fields": fields}
        )
