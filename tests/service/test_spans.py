"""OpenTelemetry's spans: of requests, within the client's trace; of the engine; and none where they are off."""

import sys
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from service.app import create_app
from service.metrics import Metrics
from service.settings import BadSettings, Settings
from service.spans import EngineSpans, observer_of
from tests.service.conftest import FakeEngine

DRAW = "/v1/images/generations"


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What an exporter that was set up around the server gets."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


def client_of(settings: Settings, engine: FakeEngine, otel: bool = True) -> TestClient:
    app = create_app(settings.model_copy(update={"otel": otel}), engine)
    return TestClient(app, raise_server_exceptions=False)


def test_a_request_is_a_span_of_the_clients_trace(
    settings: Settings, engine: FakeEngine, exported: InMemorySpanExporter
) -> None:
    inside: list[Any] = []

    async def look() -> None:
        inside.append(trace.get_current_span().get_span_context().span_id)

    engine.hold = look
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    with client_of(settings, engine) as client:
        client.post(DRAW, json={"prompt": "x"}, headers={"traceparent": parent, "X-Request-ID": "mine"})
    (span,) = exported.get_finished_spans()
    assert span.name == f"POST {DRAW}"
    assert span.context.trace_id == int("a" * 32, 16)
    assert span.parent is not None
    assert span.parent.span_id == int("b" * 16, 16)
    assert inside == [span.context.span_id]
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": DRAW,
        "http.response.status_code": 200,
        "fewstep.request_id": "mine",
        "fewstep.client": "anonymous",
    }


def test_failures_are_marked_and_tell_no_secret(
    settings: Settings, engine: FakeEngine, exported: InMemorySpanExporter
) -> None:
    engine.error = RuntimeError("unspeakable detail")
    with client_of(settings, engine) as client:
        client.post(DRAW, json={"prompt": "unspeakable"})
        client.get("/v1/images/files/unspeakable")
        client.get("/nothing")
    bug, picture, nothing = exported.get_finished_spans()
    assert (bug.status.is_ok, picture.status.is_ok) == (False, True)
    assert [span.name for span in (picture, nothing)] == ["GET /v1/images/files/{picture_id}", "GET"]
    assert not [span for span in (bug, picture, nothing) if "unspeakable" in span.to_json()]


def test_the_engine_makes_spans_after_the_fact(settings: Settings, exported: InMemorySpanExporter) -> None:
    metrics = Metrics()
    observer = observer_of(settings.model_copy(update={"otel": True}), metrics)
    before = time.time_ns()
    observer.called("network", "student", rows=3, batch=4, seconds=0.5)
    observer.ended("done", pictures=3, waited=0.25, seconds=2.0)
    call, request = exported.get_finished_spans()
    assert (call.name, request.name) == ("engine network", "engine request")
    assert (call.attributes or {})["fewstep.rows"] == 3
    assert (request.attributes or {})["fewstep.outcome"] == "done"
    assert call.start_time is not None
    assert call.end_time is not None
    assert call.end_time - call.start_time == 500_000_000
    assert call.end_time >= before
    assert metrics.rows.labels("network", "student")._value.get() == 3


def test_off_there_are_none(settings: Settings, engine: FakeEngine, exported: InMemorySpanExporter) -> None:
    metrics = Metrics()
    assert observer_of(settings, metrics) is metrics
    with client_of(settings, engine, otel=False) as client:
        client.get("/v1/models")
    assert exported.get_finished_spans() == ()


def test_without_the_package_the_start_says_so(
    settings: Settings, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    for start in (lambda: client_of(settings, engine), EngineSpans):
        with pytest.raises(BadSettings, match=r"FEWSTEP_OTEL: opentelemetry-api is not installed: pip install"):
            start()
    client_of(settings, engine, otel=False)
