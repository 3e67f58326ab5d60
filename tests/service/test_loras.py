"""LoRAs in a request and in its answer, and aliases in the list of models."""

import base64
import io
import json
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service.engine.base import Drawn, DrawRequest, ModelInfo
from tests.service.conftest import STUDENT_INFO, FakeEngine

URL = "/v1/images/generations"


def test_loras_reach_the_engine_and_come_back(client: TestClient, engine: FakeEngine, monkeypatch: Any) -> None:
    draw = engine.generate

    async def generate(request: DrawRequest) -> list[Drawn]:
        return [replace(drawn, loras=request.loras) for drawn in await draw(request)]

    monkeypatch.setattr(engine, "generate", generate)
    loras = [{"name": "ink", "scale": 0.5}, {"name": "dusk"}]
    answer = client.post(URL, json={"prompt": "red apple", "loras": loras})
    assert answer.status_code == 200
    assert engine.asked[0].loras == (("ink", 0.5), ("dusk", 1.0))
    told = [{"name": "ink", "scale": 0.5}, {"name": "dusk", "scale": 1.0}]
    assert answer.json()["drawing"]["loras"] == told
    with Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))) as picture:
        facts = [json.loads(text) for text in picture.text.values() if text.startswith("{")]
    assert [fact["loras"] for fact in facts] == [told], "the picture can be drawn again from what it says"


def test_without_loras_nothing_is_said_of_them(client: TestClient, engine: FakeEngine) -> None:
    answer = client.post(URL, json={"prompt": "red apple"})
    assert engine.asked[0].loras == ()
    assert "loras" not in answer.json()["drawing"]


@pytest.mark.parametrize(
    ("loras", "param", "says"),
    [
        ([{"name": str(number)} for number in range(5)], "loras", "at most 4"),
        ([{"name": "ink"}, {"name": "ink", "scale": 0.5}], "loras", "names a LoRA twice"),
        ([{"scale": 1.0}], "loras.0.name", "required"),
        ([{"name": "ink", "scale": 5}], "loras.0.scale", "less than or equal to 4"),
        ([{"name": "ink", "weight": 1}], "loras.0.weight", "'loras.0.weight': use one of name, scale"),
        ("ink", "loras", "list"),
    ],
)
def test_what_is_no_list_of_loras(client: TestClient, engine: FakeEngine, loras: Any, param: str, says: str) -> None:
    answer = client.post(URL, json={"prompt": "red apple", "loras": loras})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert says in answer.json()["error"]["message"]
    assert not engine.asked


def test_an_alias_is_listed_as_such(client: TestClient, engine: FakeEngine, monkeypatch: Any) -> None:
    async def models() -> list[ModelInfo]:
        return [STUDENT_INFO, replace(STUDENT_INFO, id="gpt-image-1", alias_of="student")]

    monkeypatch.setattr(engine, "models", models)
    model = client.get("/v1/models/gpt-image-1").json()
    assert (model["id"], model["alias_of"], model["steps"]) == ("gpt-image-1", "student", [1, 4])
    assert client.get("/v1/models/student").json()["alias_of"] is None
