"""The reference at /openapi.json is whole: for generators of clients, and for /docs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.keys import create_key
from service.settings import Settings
from tests.service.conftest import FakeEngine
from tests.service.fake_server import make_app

JOBS = "/v1/distillation/jobs"


@pytest.fixture
def reference(settings: Settings) -> dict[str, Any]:
    """Of a server that has jobs."""
    return dict(make_app(settings).openapi())


def references(part: Any) -> Iterator[str]:
    """Every $ref in a part of the document."""
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from references(each)


def resolve(document: dict[str, Any], reference: str) -> Any:
    start, *names = reference.split("/")
    assert start == "#", reference
    found: Any = document
    for name in names:
        found = found[name]
    return found


def test_every_reference_leads_somewhere(settings: Settings, engine: FakeEngine, reference: dict[str, Any]) -> None:
    for document in (reference, create_app(settings, engine).openapi()):
        found = set(references(document))
        assert found
        for each in found:
            assert resolve(document, each), each


def test_a_jobs_body_is_described(reference: dict[str, Any]) -> None:
    (body,) = reference["paths"][JOBS]["post"]["requestBody"]["content"].values()
    job, batch = body["schema"]["anyOf"]
    assert "student" in resolve(reference, job["$ref"])["properties"]
    assert batch["properties"]["jobs"]["items"] == job


def test_streams_are_described(reference: dict[str, Any]) -> None:
    for name in ("PartialImage", "CompletedImage"):
        assert "b64_json" in reference["components"]["schemas"][name]["properties"]
    for path, method in (("/v1/images/generations", "post"), (f"{JOBS}/{{job_id}}/events", "get")):
        content = reference["paths"][path][method]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}, path


def test_it_asks_for_a_key_where_there_are_keys(
    settings: Settings, engine: FakeEngine, reference: dict[str, Any], tmp_path: Path
) -> None:
    assert "securitySchemes" not in reference["components"]
    keys = tmp_path / "keys.json"
    create_key(keys, "ann", ["generate"])
    with TestClient(create_app(settings.model_copy(update={"keys_file": keys}), engine)) as client:
        document = client.get("/openapi.json").json()
    (name,) = document["components"]["securitySchemes"]
    scheme = document["components"]["securitySchemes"][name]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    needed = {
        (path, method): each["security"] for path, ways in document["paths"].items() for method, each in ways.items()
    }
    assert needed["/v1/images/generations", "post"] == [{name: ["generate"]}]
    assert needed["/v1/models/{model_id}", "get"] == [{name: ["generate"]}]
    assert needed["/v1/models/{model_id}", "delete"] == [{name: ["admin"]}]
    assert needed["/health/ready", "get"] == []


def test_operations_have_names_of_their_own(reference: dict[str, Any]) -> None:
    names = [each["operationId"] for ways in reference["paths"].values() for each in ways.values()]
    assert len(names) == len(set(names))
