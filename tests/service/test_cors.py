"""Web pages of other origins: off by default, and on for those that are listed."""

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.keys import create_key
from service.settings import BadSettings, Settings, read_settings
from tests.service.conftest import FakeEngine

DRAW = "/v1/images/generations"
PAGE = "https://page.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def test_off_by_default(client: TestClient) -> None:
    assert client.options(DRAW, headers=PREFLIGHT).status_code == 405
    answer = client.post(DRAW, json={"prompt": "x"}, headers={"Origin": PAGE})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


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
    with pytest.raises(BadSettings, match="is no origin"):
        read_settings(cors_origins=[origin])


def test_what_is_one() -> None:
    origins = ["*", "http://localhost:3000", "https://[::1]:8443", "https://xn--bcher-kva.example"]
    assert read_settings(cors_origins=origins).cors_origins == origins
