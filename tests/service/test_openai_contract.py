"""OpenAI's own client against this server on a real port: what it sends is understood, what it gets it can read."""

import asyncio
import base64
import io
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent
from PIL import Image

from service.app import create_app
from service.engine.base import Drawn, DrawRequest, EngineError, NotReady, Overloaded, TimedOut, UnknownModel
from service.settings import Settings
from tests.service.conftest import FakeEngine
from tests.service.live import serving


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture(scope="module")
def client(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("server")
    settings = Settings(store=folder / "store", jobs_dir=folder / "jobs", heartbeat_seconds=0.05)
    with (
        serving(create_app(settings, engine)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0) as client,
    ):
        yield client


@pytest.fixture(autouse=True)
def healthy(engine: FakeEngine) -> Iterator[None]:
    yield
    engine.error = engine.late_error = engine.hold = None


def picture(item: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def test_pictures_in_the_answer(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="red apple", n=3, size="32x32", extra_body={"seed": [4, 5, 6], "steps": 4})
    assert [picture(item).getpixel((0, 0)) for item in answer.data or []] == [(seed, 40, 200) for seed in (4, 5, 6)]
    assert (answer.size, answer.output_format, answer.background) == ("32x32", "png", "opaque")
    assert answer.created > 0


def test_pictures_as_urls(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="red apple", n=2, response_format="url", output_format="jpeg")
    for item in answer.data or []:
        assert item.url is not None and item.b64_json is None
        response = httpx.get(item.url)
        assert Image.open(io.BytesIO(response.content)).format == "JPEG"


def test_everything_the_client_can_say_about_a_picture(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.images.generate(
        prompt="red apple",
        model="student",
        n=1,
        size="auto",
        quality="high",
        style="natural",
        background="opaque",
        moderation="low",
        output_format="webp",
        output_compression=50,
        safety_identifier="someone",
        user="somebody",
        extra_body={"guidance_scale": 2.0, "diversity": True, "negative_prompt": "dog", "deterministic": True},
    )
    asked = engine.asked[-1]
    assert (asked.model, asked.guidance_scale, asked.negative_prompt) == ("student", 2.0, "dog")
    assert asked.deterministic and asked.diversity is not None


def test_a_stream_of_typed_events(client: openai.OpenAI) -> None:
    with client.images.generate(
        prompt="red apple", stream=True, partial_images=2, extra_body={"seed": 7, "steps": 4}
    ) as stream:
        first, second, done = list(stream)
    for index, event in enumerate((first, second)):
        assert isinstance(event, ImageGenPartialImageEvent)
        assert (event.type, event.partial_image_index) == ("image_generation.partial_image", index)
        assert picture(event).getpixel((0, 0)) == (index + 1,) * 3
    assert isinstance(done, ImageGenCompletedEvent)
    assert (done.type, done.size, done.quality) == ("image_generation.completed", "32x32", "auto")
    assert picture(done).getpixel((0, 0)) == (7, 40, 200)
    assert (done.usage.total_tokens, done.usage.input_tokens_details.text_tokens) == (0, 0)
    for event in (first, second, done):  # the client itself checks nothing: every field that its types want is there
        type(event).model_validate(event.model_dump(), strict=True)


def test_comments_in_a_stream_are_passed_over(client: openai.OpenAI, engine: FakeEngine) -> None:
    async def a_while() -> None:
        await asyncio.sleep(0.2)

    engine.hold = a_while
    assert [event.type for event in client.images.generate(prompt="x", stream=True)] == ["image_generation.completed"]


def test_an_error_within_a_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.late_error = TimedOut("late")
    stream = client.images.generate(prompt="x", stream=True, n=2)
    assert next(stream).type == "image_generation.completed"
    with pytest.raises(openai.APIError, match="late") as caught:
        next(stream)
    assert (caught.value.code, caught.value.type) == ("timeout", "server_error")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("raised", "expected", "code"),
    [
        (UnknownModel("no model is named 'x'"), openai.NotFoundError, "model_not_found"),
        (Overloaded("full", 7), openai.RateLimitError, "queue_full"),
        (NotReady("loads"), openai.InternalServerError, "not_ready"),
        (EngineError("failed"), openai.InternalServerError, "engine_error"),
    ],
)
def test_errors_have_their_own_classes(
    client: openai.OpenAI,
    engine: FakeEngine,
    raised: EngineError,
    expected: type[openai.APIStatusError],
    code: str,
    stream: bool,
) -> None:
    engine.error = raised
    with pytest.raises(expected) as caught:
        client.images.generate(prompt="red apple", stream=stream)
    assert caught.value.code == code
    assert str(raised) in str(caught.value)
    assert caught.value.request_id
    if isinstance(raised, Overloaded):
        assert caught.value.response.headers["retry-after"] == "7"


def test_a_wrong_value_names_its_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="red apple", n=11)
    assert (caught.value.param, caught.value.type) == ("n", "invalid_request_error")


def test_a_client_that_tries_again_is_told_when(
    client: openai.OpenAI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client's own retries obey Retry-After; the second attempt is drawn."""
    refusals = iter([Overloaded("full", 1)])

    async def generate(request: DrawRequest) -> list[Drawn]:
        for refusal in refusals:
            raise refusal
        return await FakeEngine().generate(request)

    monkeypatch.setattr(engine, "generate", generate)
    answer = client.with_options(max_retries=1).images.generate(prompt="red apple")
    assert len(answer.data or []) == 1
    assert next(refusals, None) is None


def test_models(client: openai.OpenAI) -> None:
    models = list(client.models.list())
    assert [(model.id, model.object, model.owned_by) for model in models] == [
        ("org/base", "model", "fewstep"),
        ("student", "model", "fewstep"),
    ]
    assert client.models.retrieve("student").created == 1_700_000_000
    assert client.models.retrieve("org/base").id == "org/base"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")
