"""Liveness and readiness, and that the app starts and stops what it is given."""

import http.client

import httpx
import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import FakeEngine
from tests.service.live import serving


@pytest.mark.parametrize(("path", "status"), [("/health", "ok"), ("/health/live", "live"), ("/health/ready", "ready")])
def test_all_is_well(client: TestClient, path: str, status: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.json()) == (200, {"status": status})


def test_alive_and_not_ready_while_it_loads(client: TestClient, engine: FakeEngine) -> None:
    engine.ready = False
    assert client.get("/health/live").status_code == 200
    for path in ("/health", "/health/ready"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "not_ready"
    engine.ready = True
    assert client.get("/health/ready").status_code == 200


def test_a_failed_engine_wants_a_restart(client: TestClient, engine: FakeEngine) -> None:
    engine.ready, engine.failure = False, "out of memory"
    for path in ("/health", "/health/live", "/health/ready"):
        response = client.get(path)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_failed"
        assert "out of memory" in response.json()["error"]["message"]


class FakeJobs:
    def __init__(self, life: list[str]) -> None:
        self.life = life

    async def start(self) -> None:
        self.life.append("jobs started")

    async def stop(self) -> None:
        self.life.append("jobs stopped")


def test_engine_and_jobs_live_with_the_app(settings: Settings, engine: FakeEngine) -> None:
    jobs = FakeJobs(engine.life)
    with TestClient(create_app(settings, engine, jobs)) as client:  # type: ignore[arg-type]
        assert engine.life == ["engine started", "jobs started"]
        assert client.get("/health").status_code == 200
    assert engine.life[2:] == ["jobs stopped", "engine stopped"]


def test_an_engine_is_stopped_where_the_jobs_fail_to_start(settings: Settings, engine: FakeEngine) -> None:
    class Broken(FakeJobs):
        async def start(self) -> None:
            raise OSError("no disk")

    app = create_app(settings, engine, Broken(engine.life))  # type: ignore[arg-type]
    with pytest.raises(OSError, match="no disk"), TestClient(app):
        pass
    assert engine.life[-1] == "engine stopped"


def test_a_head_is_a_get_without_its_body(settings: Settings, engine: FakeEngine) -> None:
    """Of what load balancers and download managers ask for so."""
    with serving(create_app(settings, engine)) as url:
        drawn = httpx.post(f"{url}/v1/images/generations", json={"prompt": "x", "response_format": "url"})
        picture = drawn.json()["data"][0]["url"].removeprefix(url)
        paths = ["/health", "/health/live", "/health/ready", picture, "/v1/images/files/none"]
        engine.ready = False
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)  # hides no byte too many
        for path in paths:
            whole = httpx.get(url + path)
            connection.request("HEAD", path)
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (whole.status_code, b""), path
            for name in ("content-type", "content-length", "retry-after", "cache-control"):
                assert answer.headers.get(name) == whole.headers.get(name), (path, name)
        connection.close()
        assert httpx.post(f"{url}/health/live").headers["allow"] == "GET"
