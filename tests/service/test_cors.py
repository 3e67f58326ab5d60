"""Web pages of other origins: off by default, and on for those that are listed."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.keys import create_key
from service.settings import BadSettings, Settings, read_settings
from tests.service.conftest import FakeEngine
from tests.service.fake_server import make_app

DRAW, JOBS = "/v1/images/generations", "/v1/distillation/jobs"
PAGE = "https://page.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def test_off_by_default(client: TestClient) -> None:
    assert client.options(DRAW, headers=PREFLIGHT).status_code == 405
    for answer in (client.post(DRAW, json={"prompt": "x"}, headers={"Origin": PAGE}), client.get("/v1/models")):
        assert not [name for name in answer.headers if name.startswith("access-control")]


CHANGES = [
    ("POST", DRAW),
    ("DELETE", f"{DRAW}/some-id"),
    ("DELETE", "/v1/models/student"),
    ("POST", JOBS),
    ("POST", f"{JOBS}/distill-0/cancel"),
    ("POST", f"{JOBS}/distill-0/resume"),
    ("PUT", "/nothing/here"),
]


def refused(answer: Any) -> bool:
    """Whether it was for its origin; checks the refusal's form."""
    if answer.status_code != 403:
        return False
    error = answer.json()["error"]
    assert (set(error), error["type"]) == ({"message", "type", "param", "code"}, "invalid_request_error")
    assert (error["code"], "FEWSTEP_CORS_ORIGINS" in error["message"]) == ("origin_not_allowed", True)
    assert "x-request-id" in answer.headers
    return True


@pytest.mark.parametrize(("method", "path"), CHANGES)
@pytest.mark.parametrize(
    "origin", [PAGE, "null", "http://testserver.example", "http://testserver:8000", "testserver", ""]
)
def test_another_page_changes_nothing(
    settings: Settings, engine: FakeEngine, method: str, path: str, origin: str
) -> None:
    """Also by what a browser sends without asking, such as text/plain."""
    with TestClient(make_app(settings.model_copy(update={"job_work": False}))) as client:
        text = {"Origin": origin, "Content-Type": "text/plain"}
        body = b'{"prompt": "x", "student": "s", "method": "fake"}'
        assert refused(client.request(method, path, content=body, headers=text))
        assert client.get(JOBS, headers={"Origin": origin}).json()["data"] == [], "what changes nothing is answered"


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://testserver", "testserver"),
        ("https://TESTSERVER", "testserver:80"),
        ("https://testserver:443", "testserver"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000", "[::1]:8000"),
        ("https://images.example", "10.0.0.7:8000"),
        (None, "testserver"),
    ],
)
def test_its_own_pages_may(settings: Settings, engine: FakeEngine, origin: str | None, host: str) -> None:
    """Such as /docs; behind a proxy, under the address that clients know."""
    app = create_app(settings.model_copy(update={"public_url": "https://images.example/fewstep"}), engine)
    headers = {"Host": host} if origin is None else {"Origin": origin, "Host": host}
    with TestClient(app) as client:
        assert client.post(DRAW, json={"prompt": "x"}, headers=headers).status_code == 200
        other = client.post(DRAW, json={"prompt": "x"}, headers={**headers, "Origin": "https://127.0.0.1:8001"})
        assert refused(other)


def test_one_foreign_origin_among_several_is_enough(client: TestClient) -> None:
    headers = [("Origin", "http://testserver"), ("Origin", PAGE)]
    assert refused(client.post(DRAW, json={"prompt": "x"}, headers=headers))


@pytest.mark.parametrize("listed", [[PAGE], ["*"]])
def test_listed_pages_may(settings: Settings, engine: FakeEngine, listed: list[str]) -> None:
    with TestClient(create_app(settings.model_copy(update={"cors_origins": listed}), engine)) as client:
        assert client.post(DRAW, json={"prompt": "x"}, headers={"Origin": PAGE}).status_code == 200
        other = client.post(DRAW, json={"prompt": "x"}, headers={"Origin": "https://other.example"})
        assert refused(other) == (listed != ["*"])


def test_a_listed_page_may(settings: Settings, engine: FakeEngine) -> None:
    """The browser's question needs no key; the refusal of a key can be read by the page."""
    keys = settings.store.parent / "keys.json"
    key, _ = create_key(keys, "ann", ["generate"])
    app = create_app(settings.model_copy(update={"cors_origins": [PAGE], "keys_file": keys}), engine)
    with TestClient(app) as client:
        asked = client.options(DRAW, headers=PREFLIGHT)
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, PAGE)
        assert "x-stainless-lang" in asked.headers["access-control-allow-headers"]
        for authorization, status in ((f"Bearer {key}", 200), ("Bearer wrong", 401)):
            answer = client.post(DRAW, json={"prompt": "x"}, headers={"Origin": PAGE, "Authorization": authorization})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, PAGE)
            assert "X-Request-ID" in answer.headers["access-control-expose-headers"]
            assert "access-control-allow-credentials" not in answer.headers
        other = client.options(DRAW, headers={**PREFLIGHT, "Origin": "https://other.example"})
        assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["page.example", "https://page.example/", "https://*", "null", "https://a b"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(BadSettings, match="is not an origin"):
        read_settings(cors_origins=[origin])


def test_what_is_one() -> None:
    origins = ["*", "http://localhost:3000", "https://[::1]:8443", "https://xn--bcher-kva.example"]
    assert read_settings(cors_origins=origins).cors_origins == origins
