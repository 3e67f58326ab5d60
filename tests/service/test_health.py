"""Liveness and readiness, and that the app starts and stops what it is given."""

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.service.conftest import FakeEngine


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
