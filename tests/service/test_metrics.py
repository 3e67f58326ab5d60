"""/metrics: what the engine tells and what HTTP answers is counted, under bounded names; no app sees another's counts."""

import asyncio
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.engine.observer import Observer
from service.metrics import Metrics
from service.settings import Settings
from tests.service.conftest import FakeEngine

DRAW = "/v1/images/generations"


@pytest.fixture
def counts() -> Metrics:
    return Metrics()


@pytest.fixture
def client(settings: Settings, engine: FakeEngine, counts: Metrics) -> Iterator[TestClient]:
    with TestClient(create_app(settings, engine, counts=counts), raise_server_exceptions=False) as client:
        yield client


def samples(client: TestClient) -> dict[tuple[str, ...], float]:
    """By name and label values, in the order of the labels' names."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_an_observer_is_counted(client: TestClient, counts: Metrics) -> None:
    observer: Observer = counts
    observer.called("network", "student", rows=3, batch=4, seconds=0.02)
    observer.called("network", "student", rows=8, batch=8, seconds=0.04)
    observer.called("decoder", "org/base", rows=1, batch=1, seconds=0.01)
    observer.ended("done", pictures=4, waited=0.5, seconds=2.0)
    observer.ended("cancelled", pictures=2, waited=0.0, seconds=0.1)
    found = samples(client)
    assert found["fewstep_engine_rows_total", "network", "student"] == 11
    assert found["fewstep_engine_slots_total", "network", "student"] == 12
    assert found["fewstep_engine_call_seconds_count", "network", "student"] == 2
    assert found["fewstep_engine_call_seconds_sum", "network", "student"] == pytest.approx(0.06)
    assert found["fewstep_engine_call_seconds_count", "decoder", "org/base"] == 1
    assert found["fewstep_engine_batch_size_bucket", "network", "4.0"] == 1
    assert found["fewstep_engine_batch_size_bucket", "network", "8.0"] == 2
    assert found["fewstep_requests_total", "done"] == found["fewstep_requests_total", "cancelled"] == 1
    assert (found["fewstep_pictures_total", "done"], found["fewstep_pictures_total", "cancelled"]) == (4, 2)
    assert (found["fewstep_request_wait_seconds_count",], found["fewstep_request_wait_seconds_sum",]) == (2, 0.5)
    assert found["fewstep_request_seconds_sum", "done"] == 2


def test_the_load_is_read_at_the_scrape(client: TestClient, engine: FakeEngine) -> None:
    assert samples(client)["fewstep_queue_pictures",] == 0
    engine.drawing = 6
    found = samples(client)
    assert (found["fewstep_queue_pictures",], found["fewstep_queue_seconds",]) == (6, 3.0)
    assert (found["fewstep_resident_bytes", "org/base"], found["fewstep_resident_bytes", "student"]) == (1000, 200)
    assert found["fewstep_engine_ready",] == 1
    engine.ready = False
    assert samples(client)["fewstep_engine_ready",] == 0


def test_answers_are_counted_by_route(client: TestClient, engine: FakeEngine) -> None:
    url = client.post(DRAW, json={"prompt": "x", "response_format": "url"}).json()["data"][0]["url"]
    client.get(url)
    client.get("/v1/models/org/base")
    client.get("/v1/models/nobody")
    client.post(DRAW, json={})
    engine.error = RuntimeError("a bug")
    client.post(DRAW, json={"prompt": "x"})
    found = samples(client)
    name = "fewstep_http_requests_total"
    assert [found[name, "POST", DRAW, status] for status in ("200", "400", "500")] == [1, 1, 1]
    assert found[name, "GET", "/v1/images/files/{picture_id}", "200"] == 1
    assert found[name, "GET", "/v1/models/{model_id}", "200"] == found[name, "GET", "/v1/models/{model_id}", "404"] == 1
    assert found["fewstep_http_request_seconds_count", "POST", DRAW] == 3


def test_clients_cannot_make_names(client: TestClient) -> None:
    """However many paths, methods and ids clients think up, there are no more series than before."""

    def series() -> int:
        return len(samples(client))

    for _ in range(2):
        client.get("/nothing")
        client.request("BREW", "/nothing")
        series()
    before = series()
    for number in range(20):
        client.get(f"/nothing/{number}", headers={"X-Request-ID": f"id-{number}"})
        client.request(f"BREW{number}", f"/v1/{number}")
    assert series() == before


def test_a_client_that_went_away_is_counted(client: TestClient, counts: Metrics) -> None:
    from service.tracking import Tracking

    async def gone(scope: object, receive: object, send: object) -> None:
        raise asyncio.CancelledError

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(Tracking(gone, counts, None)(scope, None, None))  # type: ignore[arg-type]
    assert samples(client)["fewstep_http_requests_total", "GET", "none", "499"] == 1


def test_apps_have_their_own_counts(client: TestClient, settings: Settings, engine: FakeEngine) -> None:
    client.get("/v1/models")
    with TestClient(create_app(settings, engine)) as other:
        assert ("fewstep_http_requests_total", "GET", "/v1/models", "200") not in samples(other)
    assert ("fewstep_http_requests_total", "GET", "/v1/models", "200") in samples(client)


def test_openmetrics_where_it_is_asked_for(client: TestClient) -> None:
    response = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
