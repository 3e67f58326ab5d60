"""A real server on a real port, drawing with a real (tiny) student: through httpx, and through OpenAI's own client."""

import base64
import hashlib
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from service.app import create_app
from service.engine.step_engine import StepEngine
from service.settings import Settings
from tests.service import answers
from tests.service.conftest import TinyBase
from tests.service.live import serving
from weights.contracts import DataSpec, DistillJob, Router
from weights.store import Store

JOB = DistillJob(student="tiny", method="dmd2", data=DataSpec(source="/some/folder"))


@pytest.fixture(scope="module")
def address(tiny_base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    settings = Settings(
        store=folder / "store", jobs_dir=folder / "jobs", bases=[tiny_base.id], default_model="tiny", device="cpu"
    )
    store = Store(settings.store)
    tiny_base.publish(store, folder / "work", job=JOB)
    tiny_base.publish(store, folder / "other", "other", change=0.9)
    centroids = tiny_base.model.embed_prompts(["red apple", "blue dog"]).tolist()
    router = Router(centroids=centroids, students=["tiny", "other"])
    (folder / "none").mkdir()
    routed = store.manifest("tiny").model_copy(update={"name": "routed", "router": router, "files": {}})
    store.publish(routed, folder / "none")
    app = create_app(settings, StepEngine.from_settings(settings))
    with serving(app) as url:
        yield url


def test_draw_over_http(address: str) -> None:
    fields = {"prompt": "red apple", "n": 2, "seed": 3, "steps": 2, "diversity": True, "response_format": "url"}
    response = httpx.post(f"{address}/v1/images/generations", json=fields, timeout=60)
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["model"], body["size"], body["drawing"]["network_evaluations"]) == ("tiny", "32x32", 2)
    first, second = (httpx.get(item["url"]) for item in body["data"])
    assert first.content != second.content
    assert Image.open(io.BytesIO(first.content)).size == (32, 32)


def test_a_routed_student_over_http(address: str) -> None:
    (model,) = [m for m in httpx.get(f"{address}/v1/models").json()["data"] if m["id"] == "routed"]
    assert model["students"] == ["tiny", "other"]
    answers = {}
    for name in ("routed", "tiny", "other"):
        fields = {"model": name, "prompt": "blue dog", "seed": 3, "response_format": "b64_json"}
        answers[name] = httpx.post(f"{address}/v1/images/generations", json=fields, timeout=60).json()
    assert answers["routed"]["drawing"]["student"] == "other"
    assert "student" not in answers["other"]["drawing"]
    pixels = {name: picture(answer).tobytes() for name, answer in answers.items()}
    assert pixels["routed"] == pixels["other"] != pixels["tiny"]


def picture(answer: dict[str, Any]) -> Image.Image:
    return answers.picture(answer["data"][0])


def test_a_png_names_what_drew_it(address: str, tiny_base: TinyBase) -> None:
    """Student, base and the job that made it, by its hash: a picture must not tell the folders of the server."""
    facts = {}
    for name in ("tiny", tiny_base.id):
        fields = {"model": name, "prompt": "red apple", "seed": 3, "steps": 1}
        image = picture(httpx.post(f"{address}/v1/images/generations", json=fields, timeout=60).json())
        facts[name] = json.loads(image.info["fewstep"])
        assert (facts[name]["model"], facts[name]["seed"], facts[name]["steps"]) == (name, 3, 1)
        assert "/some/folder" not in image.info["fewstep"]
    job = json.dumps(JOB.model_dump(mode="json"), sort_keys=True)
    assert [facts["tiny"][what] for what in ("student", "base", "job")] == [
        "tiny",
        tiny_base.id,
        hashlib.sha256(job.encode()).hexdigest(),
    ]
    assert [facts[tiny_base.id][what] for what in ("student", "base", "job")] == [None, None, None]


def test_refusals_over_http(address: str) -> None:
    fields = {"prompt": "red apple", "steps": 1, "diversity": True}
    response = httpx.post(f"{address}/v1/images/generations", json=fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "diversity")
    large = httpx.post(f"{address}/v1/images/generations", content=b"x" * 100_000)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")


def test_the_official_client_works(address: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client:
        assert {model.id for model in client.models.list()} >= {"tiny"}
        assert client.models.retrieve("tiny").owned_by == "fewstep"
        answer = client.images.generate(
            model="tiny", prompt="red apple", n=2, size="32x32", response_format="b64_json", extra_body={"seed": [4, 5]}
        )
        assert [Image.open(io.BytesIO(base64.b64decode(item.b64_json))).size for item in answer.data] == [(32, 32)] * 2
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(model="tiny", prompt="red apple", n=11)
        assert caught.value.param == "n"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("nobody")
