"""Whatever is sent, no answer is a 5xx, and each has the shape that the API's own schema promises."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from service.app import create_app
from service.schemas import ImageRequest
from service.settings import Settings
from service.trace_schemas import TraceRequest
from tests.service.conftest import TinyBase
from tests.service.fake_server import PaintingEngine, make_app
from tests.service.served import Served, served

DRAW, TRACE = "/v1/images/generations", "/v1/images/trace"
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
FUZZED = settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The app around an engine that paints squares."""
    folder = tmp_path_factory.mktemp("fuzz")
    folders = Settings(store=folder / "store", jobs_dir=folder / "jobs")
    with TestClient(create_app(folders, PaintingEngine(folders)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def client_of_jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The same with jobs, which nobody works on; each that is submitted is checked by a process, which takes its time."""
    folder = tmp_path_factory.mktemp("fuzz-jobs")
    app = make_app(Settings(store=folder / "store", jobs_dir=folder / "jobs", job_work=False))
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("which", ["client", pytest.param("client_of_jobs", marks=pytest.mark.slow)])
def test_every_operation_keeps_to_its_schema(
    which: str, request: pytest.FixtureRequest, subtests: pytest.Subtests
) -> None:
    """Asked what the schema allows, and with bodies that it does not."""
    client: TestClient = request.getfixturevalue(which)
    operations = [
        found.ok() for found in schemathesis.openapi.from_asgi("/openapi.json", client.app).get_all_operations()
    ]
    assert {operation.label for operation in operations} >= {f"POST {DRAW}", f"POST {TRACE}", "GET /health/ready"}
    for operation in operations:
        modes = GenerationMode if operation.body else (GenerationMode.POSITIVE,)
        for mode in modes:
            with subtests.test(f"{operation.label}, {mode.value}"):
                keeps_to_its_schema(operation, mode)


def keeps_to_its_schema(operation: Any, mode: GenerationMode) -> None:
    @FUZZED
    @given(case=operation.as_strategy(generation_mode=mode))
    def holds(case: Case) -> None:
        case.call_and_validate(checks=CHECKS)

    holds()


def check(response: Any) -> None:
    """A success, or the client's own fault in the error shape."""
    assert response.status_code < 500, response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert 0 < len(error["message"]) < 3000


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(FUZZED, max_examples=200)
@given(path=st.sampled_from([DRAW, TRACE]), content=st.binary(max_size=60) | st.builds(json.dumps, ANYTHING))
def test_bytes_that_are_no_request(client: TestClient, path: str, content: bytes | str) -> None:
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    check(response)
    assert response.status_code == 400


@settings(FUZZED, max_examples=300)
@given(
    path=st.sampled_from([DRAW, TRACE]),
    body=st.fixed_dictionaries({"prompt": st.just("red apple") | ANYTHING}).flatmap(
        lambda body: st.dictionaries(
            st.sampled_from(sorted(set(ImageRequest.model_fields) | set(TraceRequest.model_fields))),
            ANYTHING,
            max_size=3,
        ).map(lambda more: {**body, **more})
    ),
)
def test_every_field_with_anything_in_it(client: TestClient, path: str, body: dict[str, Any]) -> None:
    check(client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}))


@pytest.fixture(scope="module")
def server(tiny_base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tiny_base, tmp_path_factory.mktemp("served")) as server:
        yield server


TEXTS = st.text(st.characters(), min_size=1, max_size=30) | st.sampled_from(
    ["red apple", "a" * 999, "\x00", "🍎" * 50, "\u202e\u200f", "\ud800", " x ", "<|endoftext|>", "[MASK]"]
)
SCALES = st.sampled_from([0, 0.0, 1, 1.0, 1e-300, 1e-9, 0.5, 3.0, 50.0])
ASKED = {
    "model": st.sampled_from(["tiny", "BASE", "nobody", "../tiny", ".", "tiny/student.json"]),
    "n": st.integers(1, 4),
    "seed": st.sampled_from([0, 2**31, 2**32, 2**53 - 1]),
    "steps": st.integers(1, 5),
    "size": st.sampled_from(["auto", "32x32", "64x64", "1x1", "9999x9999"]),
    "guidance_scale": SCALES,
    "negative_prompt": TEXTS,
    "diversity": st.booleans()
    | st.fixed_dictionaries({}, optional={"base_steps": st.integers(1, 8), "base_guidance": SCALES}),
    "deterministic": st.booleans(),
    "loras": st.just([]) | st.just([{"name": "tiny", "scale": 1.0}]) | st.just([{"name": "nobody", "scale": -3.0}]),
    "output_format": st.sampled_from(["png", "jpeg", "webp"]),
    "response_format": st.sampled_from(["b64_json", "url"]),
}


@settings(FUZZED, max_examples=80)
@given(
    path=st.sampled_from([DRAW, DRAW, TRACE]),
    prompt=TEXTS,
    fields=st.fixed_dictionaries({}, optional=ASKED),
    more=st.sampled_from([{}, {"stream": True, "partial_images": 3}, {"strip": True}]),
)
def test_a_real_engine_draws_or_says_why_not(
    server: Served, tiny_base: TinyBase, path: str, prompt: str, fields: dict[str, Any], more: dict[str, Any]
) -> None:
    body = {"prompt": prompt, **fields, **more}
    if body.get("model") == "BASE":
        body["model"] = tiny_base.id
    content = json.dumps(body)
    response = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=60)
    check(response)
    if response.headers["content-type"].startswith("text/event-stream"):
        assert "event: error" not in response.text
        assert response.text.count("event: image_generation.completed") == body.get("n", 1)
