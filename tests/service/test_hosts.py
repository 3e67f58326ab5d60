"""Which names a server without keys answers to: any page's owner can have a name lead to 127.0.0.1."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.keys import create_key
from service.settings import BadSettings, Settings, read_settings
from tests.service.conftest import FakeEngine

DRAW = "/v1/images/generations"
EVIL = "rebound.example"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"allowed_hosts": []})


def client_of(settings: Settings, engine: FakeEngine, called: str, **fields: Any) -> TestClient:
    app = create_app(settings.model_copy(update=fields), engine)
    return TestClient(app, base_url="http://127.0.0.1", headers={"Host": called})


def refused(answer: Any) -> bool:
    """Whether it was for its host; checks the refusal's form."""
    if answer.status_code != 421:
        return False
    error = answer.json()["error"]
    assert (set(error), error["type"]) == ({"message", "type", "param", "code"}, "invalid_request_error")
    assert error["code"] == "host_not_allowed"
    assert all(word in error["message"] for word in ("127.0.0.1", "FEWSTEP_ALLOWED_HOSTS", "FEWSTEP_KEYS_FILE"))
    assert "x-request-id" in answer.headers
    return True


@pytest.mark.parametrize("path", ["/v1/models", "/v1/distillation/jobs", "/docs", "/metrics", "/health/ready", "/"])
@pytest.mark.parametrize(
    "host", [EVIL, f"{EVIL}:8000", "localhost.example", "127.0.0.1.example", "mylocalhost", "api", ""]
)
def test_a_page_of_a_name_that_was_made_to_lead_here(
    settings: Settings, engine: FakeEngine, host: str, path: str
) -> None:
    """To its browser it is this server's own: it sends that very Origin with what changes something, and none to read."""
    with client_of(settings, engine, host) as client:
        read = client.get(path)
        assert refused(read)
        assert repr(host) in read.json()["error"]["message"]
        assert refused(client.post(DRAW, json={"prompt": "x"}, headers={"Origin": f"http://{host}"}))
    assert engine.asked == []


OWN = ["localhost:8000", "LOCALHOST", "localhost.", "fewstep.localhost:8000"]
ADDRESSES = ["127.0.0.1:8000", "127.0.0.1", "[::1]:8000", "[::1]", "10.0.0.7:8000", "[2001:db8::7]"]


@pytest.mark.parametrize("host", OWN + ADDRESSES)
def test_nobody_else_can_be_behind_an_address_or_localhost(settings: Settings, engine: FakeEngine, host: str) -> None:
    """Such as what compose publishes, and what asks a container for its health."""
    with client_of(settings, engine, host, host="0.0.0.0", allow_open=True) as client:
        assert client.post(DRAW, json={"prompt": "x"}, headers={"Origin": f"http://{host}"}).status_code == 200


@pytest.mark.parametrize(
    "named",
    [
        {"allowed_hosts": ["other.example", "Images.example"]},
        {"allowed_hosts": ["*"]},
        {"public_url": "https://images.example:8443/fewstep"},
        {"host": "images.example", "allow_open": True},
    ],
    ids=str,
)
def test_names_that_the_settings_give(settings: Settings, engine: FakeEngine, named: dict[str, Any]) -> None:
    with client_of(settings, engine, "images.example", **named) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Host": "IMAGES.example.:80"}).status_code == 200
        assert refused(client.get("/v1/models", headers={"Host": EVIL})) == (named != {"allowed_hosts": ["*"]})


def test_one_foreign_name_among_several_is_enough(settings: Settings, engine: FakeEngine) -> None:
    with client_of(settings, engine, "localhost") as client:
        assert refused(client.get("/v1/models", headers=[("Host", "localhost"), ("Host", EVIL)]))


def test_keys_keep_such_a_page_out_by_themselves(settings: Settings, engine: FakeEngine) -> None:
    keys = settings.store.parent / "keys.json"
    key, _ = create_key(keys, "ann", ["generate"])
    with client_of(settings, engine, EVIL, keys_file=keys) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize("name", ["https://a.example", "a.example:8000", "*.example", "", "a b", "a.example/"])
def test_what_is_no_host_name(name: str) -> None:
    with pytest.raises(BadSettings, match=r"FEWSTEP_ALLOWED_HOSTS: .* is not a host name"):
        read_settings(allowed_hosts=[name])
