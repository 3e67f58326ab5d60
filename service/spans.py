"""OpenTelemetry spans of requests and of the engine's work for them, if OpenTelemetry is installed and switched on.

Only its API is used. Exporters are configured from outside, as with ``opentelemetry-instrument fewstep serve``.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from service.engine.observer import Call, Observer, Outcome
from service.settings import BadSettings, Settings

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

End = Callable[[str | None, str, int], None]
"""Called at the end of the response with the route template, the client and the status."""


def load_tracer() -> "Tracer":
    """This project's tracer.

    Raises:
        BadSettings: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise BadSettings("FEWSTEP_OTEL: opentelemetry-api is not installed: pip install 'fewstep[otel]'") from error
    return trace.get_tracer("fewstep")


class Spans:
    """A span for each HTTP request, in the trace that the client's ``traceparent`` header names."""

    def __init__(self, tracer: "Tracer | None" = None) -> None:
        self._tracer = tracer or load_tracer()

    @contextmanager
    def request(self, scope: Scope, request_id: str) -> Iterator[End]:
        """The span of one request. It does not include the path, which may be an image's secret URL."""
        from opentelemetry import propagate
        from opentelemetry.trace import SpanKind, Status, StatusCode

        method = scope["method"]
        attributes = {"http.request.method": method, "fewstep.request_id": request_id}
        parent = propagate.extract(dict(Headers(scope=scope)))
        # Exceptions are only logged, since their messages may contain anything.
        with self._tracer.start_as_current_span(
            method, parent, SpanKind.SERVER, attributes, record_exception=False, set_status_on_exception=False
        ) as span:

            def end(route: str | None, client: str, status: int) -> None:
                if route is not None:
                    span.update_name(f"{method} {route}")
                    span.set_attribute("http.route", route)
                span.set_attribute("http.response.status_code", status)
                span.set_attribute("fewstep.client", client)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))

            yield end


class EngineSpans:
    """An `Observer` that creates spans of the engine's calls and requests after they have ended.

    They are not nested in the spans of HTTP requests, since one call serves many requests.
    """

    def __init__(self, tracer: "Tracer | None" = None) -> None:
        self._tracer = tracer or load_tracer()

    def called(self, call: Call, model: str, rows: int, batch: int, seconds: float) -> None:
        """See `Observer.called`."""
        self._past(f"engine {call}", seconds, {"model": model, "rows": rows, "batch": batch})

    def ended(self, outcome: Outcome, pictures: int, waited: float, seconds: float) -> None:
        """See `Observer.ended`."""
        self._past("engine request", seconds, {"outcome": outcome, "pictures": pictures, "waited": waited})

    def _past(self, name: str, seconds: float, attributes: dict[str, Any]) -> None:
        now = time.time_ns()
        named = {f"fewstep.{key}": value for key, value in attributes.items()}
        span = self._tracer.start_span(name, start_time=now - round(seconds * 1e9), attributes=named)
        span.end(now)


class Observers:
    """Combines several observers into one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def called(self, call: Call, model: str, rows: int, batch: int, seconds: float) -> None:
        """See `Observer.called`."""
        for observer in self._observers:
            observer.called(call, model, rows, batch, seconds)

    def ended(self, outcome: Outcome, pictures: int, waited: float, seconds: float) -> None:
        """See `Observer.ended`."""
        for observer in self._observers:
            observer.ended(outcome, pictures, waited, seconds)


def observer_of(settings: Settings, metrics: Observer) -> Observer:
    """The observer for an engine with these settings.

    Raises:
        BadSettings: spans are switched on, but OpenTelemetry is not installed.
    """
    return Observers(metrics, EngineSpans()) if settings.otel else metrics
