"""Every answer and every line of the log has its request's id; the log is JSON where that is wanted, and holds no secret."""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from service import logs
from service.app import create_app
from service.keys import create_key
from service.settings import Settings
from tests.service.conftest import FakeEngine

DRAW = "/v1/images/generations"
MADE = re.compile(r"req_[0-9a-f]{24}")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """The whole log as JSON lines, without the tests' own client."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonLines())
    handler.addFilter(lambda record: not record.name.startswith("httpx2"))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def lines(written: io.StringIO, logger: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in written.getvalue().splitlines()]
    return [line for line in found if logger in (None, line["logger"])]


@pytest.mark.parametrize("path", ["/health", "/nothing", "/v1/models", "/metrics"])
def test_every_answer_has_an_id(client: TestClient, path: str) -> None:
    first, second = (client.get(path).headers["x-request-id"] for _ in range(2))
    assert MADE.fullmatch(first)
    assert first != second


@pytest.mark.parametrize("offered", ["a", "0f8fad5b-d9cb-469f-a165-70867728950e", "A.b_c:d-9", "x" * 128])
def test_a_sane_id_is_kept(client: TestClient, offered: str) -> None:
    answer = client.post(DRAW, json={}, headers={"X-Request-ID": offered})
    assert (answer.status_code, answer.headers["x-request-id"]) == (400, offered)


@pytest.mark.parametrize("offered", ["", "x" * 129, "a b", "a\tb", 'a"b', "{}", "ä".encode(), "a,b", "a\\nb"])
def test_another_id_is_replaced(client: TestClient, offered: str | bytes) -> None:
    answer = client.get("/health", headers={"X-Request-ID": offered})  # type: ignore[dict-item]
    assert MADE.fullmatch(answer.headers["x-request-id"])


@given(st.text(max_size=200))
def test_no_id_can_forge_a_line(offered: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", logs.choose_id(offered))


def test_a_bugs_answer_and_its_trace_have_the_id(client: TestClient, engine: FakeEngine) -> None:
    engine.error = RuntimeError("a bug")
    answer = client.post(DRAW, json={"prompt": "x"}, headers={"X-Request-ID": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert "under the id mine" in answer.json()["error"]["message"]


def test_the_access_log(client: TestClient, written: io.StringIO) -> None:
    client.post(DRAW, json={"prompt": "x"}, headers={"X-Request-ID": "mine"})
    (line,) = lines(written, "service.access")
    assert set(line) == {
        "time", "level", "logger", "message", "request_id", "method", "path", "status", "seconds", "client",
    }  # fmt: skip
    assert (line["method"], line["path"], line["status"], line["client"]) == ("POST", DRAW, 200, "anonymous")
    assert (line["level"], line["request_id"]) == ("info", "mine")
    assert line["seconds"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    assert line["message"].startswith(f"POST '{DRAW}' 200 ")


def test_lines_of_the_engine_have_the_id(client: TestClient, engine: FakeEngine, written: io.StringIO) -> None:
    async def hold() -> None:
        logging.getLogger("some.engine").warning("deep inside")

    engine.hold = hold
    client.post(DRAW, json={"prompt": "x"}, headers={"X-Request-ID": "mine"})
    assert [(line["message"], line["request_id"]) for line in lines(written, "some.engine")] == [
        ("deep inside", "mine")
    ]
    logging.getLogger("some.engine").warning("outside")
    assert lines(written, "some.engine")[-1]["request_id"] is None


def test_health_checks_are_quiet(client: TestClient, written: io.StringIO) -> None:
    client.get("/health/live")
    client.get("/metrics")
    assert [line["level"] for line in lines(written, "service.access")] == ["debug", "debug"]


def test_no_secret_is_logged(settings: Settings, engine: FakeEngine, tmp_path: Path, written: io.StringIO) -> None:
    """Prompts, keys (right and wrong ones), and the ids of pictures, whatever becomes of the request."""
    key, record = create_key(tmp_path / "keys.json", "ann", ["generate"])
    app = create_app(settings.model_copy(update={"keys_file": tmp_path / "keys.json"}), engine)
    prompt, negative = "unspeakable apple", "unspeakable pear"
    body = {"prompt": prompt, "negative_prompt": negative, "response_format": "url"}
    headers = {"Authorization": f"Bearer {key}"}
    with TestClient(app, raise_server_exceptions=False) as client:
        url = client.post(DRAW, json=body, headers=headers).json()["data"][0]["url"]
        client.get(url)
        client.get(url + "/")
        client.post(DRAW + f"?key={key}", json={**body, "steps": 0}, headers=headers)
        client.post(DRAW, json=body, headers={"Authorization": "Bearer fs_wrong_unspeakable"})
        engine.error = RuntimeError("a bug")
        client.post(DRAW, json=body, headers=headers)
    text = written.getvalue()
    secrets = ("unspeakable", key, key.split("_")[2], record.sha256, url.rsplit("/", 1)[1])
    assert [secret for secret in secrets if secret in text] == []
    access = lines(written, "service.access")
    assert [line["status"] for line in access] == [200, 200, 404, 400, 401, 500]
    assert [line["client"] for line in access] == [record.id, *["anonymous"] * 2, record.id, "anonymous", record.id]


def test_a_path_cannot_forge_a_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        client.get("/x%0a2026-01-01%20INFO%20root:%20forged" + "y" * 5000)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "service.access"]
    assert "\n" not in message
    assert len(message) < 250


def record_of(**fields: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "n", "levelname": "WARNING", "msg": "at %s", "args": ("dawn",), **fields})


def test_json_lines_hold_a_trace_and_odd_text_in_one_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = record_of(msg="röd\n\u2028", args=(), exc_info=(ValueError, error, error.__traceback__))
    line = logs.JsonLines().format(record)
    assert "\n" not in line
    content = json.loads(line)
    assert (content["message"], content["level"], content["request_id"]) == ("röd", "warning", None)
    assert content["exception"].endswith("ValueError: two\nlines")


def test_text_lines() -> None:
    assert re.fullmatch(r"\S+ \S+ WARNING n: at dawn", logs.TextLines().format(record_of()))
    token = logs.request_id.set("mine")
    try:
        assert logs.TextLines().format(record_of()).endswith("WARNING n: at dawn [mine]")
    finally:
        logs.request_id.reset(token)
