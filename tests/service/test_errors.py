"""Every answer that is no success has the one error shape, and none tells of our inside."""

from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from service.app import create_app
from service.engine.base import BadRequest, EngineError, ModelBroken, NotReady, Overloaded, TimedOut, UnknownModel
from service.settings import Settings
from tests.service.answers import UNREADABLE
from tests.service.conftest import FakeEngine

URL = "/v1/images/generations"


def error_of(response: Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    expected = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    assert body["error"]["type"] == expected
    assert body["error"]["message"]
    return dict(body["error"])


@pytest.mark.parametrize(
    "path", ["/", "/nope", "/v1/images", "/v1/models/", "/v1/distillation/jobs", "/v1/images/files/"]
)
def test_unknown_paths(client: TestClient, path: str) -> None:
    error = error_of(client.get(path), 404)
    assert error["code"] in ("not_found", "model_not_found")


def test_the_message_repeats_little_of_a_long_path(client: TestClient) -> None:
    assert len(error_of(client.get("/" + "x" * 5000), 404)["message"]) < 150


def test_a_method_that_is_not_allowed(client: TestClient) -> None:
    response = client.get(URL)
    error = error_of(response, 405)
    assert error["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    assert "use POST" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        (
            "POST",
            URL,
            "there is no query parameter 'steps': this path takes none; send the request's fields as JSON in",
        ),
        ("POST", "/v1/images/trace", "this path takes none; send"),
        ("GET", "/v1/models", "there is no query parameter 'steps': this path takes none"),
        ("DELETE", f"{URL}/some-request", "this path takes none"),
    ],
)
def test_query_parameters_that_are_none(client: TestClient, method: str, path: str, says: str) -> None:
    body = {"prompt": "red apple"} if method == "POST" else None
    error = error_of(client.request(method, path, params={"steps": 1}, json=body), 400)
    assert (error["param"], error["code"]) == ("steps", "unknown_parameter")
    assert says in error["message"]


def test_probes_may_add_query_parameters(client: TestClient) -> None:
    assert client.get("/health/live", params={"probe": 1}).status_code == 200


def test_a_body_that_announces_too_much(client: TestClient, engine: FakeEngine) -> None:
    response = client.post(URL, json={"prompt": "x" * 5000})
    assert error_of(response, 413)["code"] == "body_too_large"
    assert engine.asked == []


def test_a_body_that_grows_too_large(client: TestClient, engine: FakeEngine) -> None:
    chunks = (b'{"prompt": "' if number == 0 else b"x" * 500 for number in range(20))
    response = client.post(URL, content=chunks, headers={"Content-Type": "application/json"})
    assert error_of(response, 413)["code"] == "body_too_large"
    assert engine.asked == []


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", "missing_required_parameter", "the request has no body: send JSON"),
        (b"[]", "invalid_value", "must be a JSON object"),
        (b"3", "invalid_value", "must be a JSON object"),
        (b"null", None, ""),
        (b"{}", "missing_required_parameter", "prompt is required"),
        (b'{"\\ud800": 1}', "invalid_value", "the body: input should be a valid string"),
    ],
)
def test_a_body_that_is_no_request(client: TestClient, content: bytes, code: str | None, says: str) -> None:
    error = error_of(client.post(URL, content=content, headers={"Content-Type": "application/json"}), 400)
    assert code is None or error["code"] == code
    assert says in error["message"]


@pytest.mark.parametrize(("content", "says"), UNREADABLE)
def test_a_body_that_cannot_be_read(settings: Settings, engine: FakeEngine, content: bytes, says: str) -> None:
    with TestClient(create_app(settings.model_copy(update={"max_body_bytes": 65_536}), engine)) as client:
        error = error_of(client.post(URL, content=content, headers={"Content-Type": "application/json"}), 400)
    assert (error["code"], error["param"]) == ("invalid_json", None)
    assert error["message"].startswith("the body is not valid JSON: ")
    assert says in error["message"]


def test_a_body_that_is_called_something_else(client: TestClient) -> None:
    error = error_of(client.post(URL, content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}), 400)
    assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize(
    ("raised", "status", "code", "param"),
    [
        (BadRequest("steps", "steps"), 400, "invalid_value", "steps"),
        (UnknownModel("none"), 404, "model_not_found", "model"),
        (Overloaded("full", 7), 429, "queue_full", None),
        (NotReady("loads"), 503, "not_ready", None),
        (ModelBroken("broken"), 503, "model_broken", "model"),
        (TimedOut("late"), 504, "timeout", None),
        (EngineError("failed"), 500, "engine_error", None),
    ],
)
def test_errors_of_the_engine(
    client: TestClient, engine: FakeEngine, raised: EngineError, status: int, code: str, param: str | None
) -> None:
    engine.error = raised
    response = client.post(URL, json={"prompt": "x"})
    error = error_of(response, status)
    assert (error["code"], error["param"], error["message"]) == (code, param, str(raised))
    if isinstance(raised, Overloaded):
        assert response.headers["retry-after"] == "7"


def test_a_bug_tells_nothing(client: TestClient, engine: FakeEngine) -> None:
    engine.error = RuntimeError("secret detail at /some/path")
    response = client.post(URL, json={"prompt": "x"})
    error = error_of(response, 500)
    assert error["code"] == "internal_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_a_bug_reaches_the_log(settings: Settings, engine: FakeEngine) -> None:
    """The server logs what an app raises: the handler must not swallow it."""
    engine.error = RuntimeError("secret detail")
    with TestClient(create_app(settings, engine)) as client, pytest.raises(RuntimeError, match="secret detail"):
        client.post(URL, json={"prompt": "x"})
