"""``POST /v1/images/generations``: OpenAI's shape, our extensions, and what is refused."""

import asyncio
import io
import json
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service import routes
from service.app import create_app
from service.engine.base import DiversityWish
from service.pictures import PictureStore
from service.schemas import MAX_SEED, ImageRequest
from service.settings import Settings
from tests.service import answers
from tests.service.answers import picture
from tests.service.conftest import FakeEngine

URL = "/v1/images/generations"


def ask(client: TestClient, **fields: Any) -> dict[str, Any]:
    return answers.ask(client, URL, **fields)


def test_one_picture(client: TestClient, engine: FakeEngine) -> None:
    body = ask(client)
    assert set(body) == {"created", "data", "model", "size", "output_format", "background", "drawing"}
    (item,) = body["data"]
    assert set(item) == {"b64_json", "seed"}
    assert picture(item).size == (32, 32)
    assert (body["model"], body["size"], body["output_format"]) == ("student", "32x32", "png")
    assert body["drawing"] == {"steps": 4, "guidance_scale": 1.0, "network_evaluations": 4, "seconds": 0.01}
    (asked,) = engine.asked
    assert (asked.prompt, asked.model) == ("red apple", None)
    assert (asked.steps, asked.diversity, asked.size) == (None, None, None)


def test_every_extension_reaches_the_engine(client: TestClient, engine: FakeEngine) -> None:
    ask(
        client,
        model="student",
        n=2,
        seed=[5, 9],
        steps=2,
        size="32x32",
        diversity={"base_steps": 2, "base_guidance": 1.5, "start": 0.9, "skip": 0, "until": 0.5, "unprompted": 0.25},
        guidance_scale=3,
        negative_prompt="blue",
        deterministic=True,
    )
    (asked,) = engine.asked
    assert (asked.seeds, asked.steps, asked.size) == ((5, 9), 2, (32, 32))
    assert asked.diversity == DiversityWish(
        base_steps=2, base_guidance=1.5, start=0.9, skip=0, until=0.5, unprompted=0.25
    )
    assert (asked.guidance_scale, asked.negative_prompt, asked.deterministic) == (3, "blue", True)


def test_a_server_can_be_deterministic(settings: Settings, engine: FakeEngine) -> None:
    with TestClient(create_app(settings.model_copy(update={"deterministic": True}), engine)) as client:
        ask(client)
        ask(client, deterministic=False)
    assert [asked.deterministic for asked in engine.asked] == [True, True]


def test_openai_fields_and_nulls_are_accepted(client: TestClient) -> None:
    body = ask(
        client,
        n=None,
        size="auto",
        quality="hd",
        style="vivid",
        background="opaque",
        moderation="low",
        user="someone",
        stream=False,
        partial_images=None,
        seed=None,
        diversity=None,
        output_compression=None,
    )
    assert len(body["data"]) == 1
    assert picture(ask(client, output_format="png", output_compression=100)["data"][0]).format == "PNG"


def test_seeds_count_up_from_one_number(client: TestClient) -> None:
    assert [item["seed"] for item in ask(client, n=3, seed=7)["data"]] == [7, 8, 9]
    assert [item["seed"] for item in ask(client, n=2, seed=MAX_SEED)["data"]] == [MAX_SEED, 0]


def test_seeds_are_random_where_none_is_given(client: TestClient) -> None:
    first, second = (tuple(item["seed"] for item in ask(client, n=4)["data"]) for _ in range(2))
    assert len({*first, *second}) == 8
    assert ask(client, seed=first[0])["data"][0]["seed"] == first[0]


def test_the_switch_for_diversity(client: TestClient, engine: FakeEngine) -> None:
    used = ask(client, diversity=True)["drawing"]["diversity"]
    assert used == {"base_steps": 1, "base_guidance": 1.0, "skip": 1, "start": 1.0, "unprompted": 0.0}
    assert "diversity" not in ask(client, diversity=False)["drawing"]
    assert [asked.diversity for asked in engine.asked] == [DiversityWish(), None]


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_formats(client: TestClient, output_format: str) -> None:
    body = ask(client, output_format=output_format, seed=77)
    image = picture(body["data"][0])
    assert (image.format, body["output_format"]) == (output_format.upper(), output_format)
    red, green, blue = image.convert("RGB").getpixel((16, 16))  # type: ignore[misc]
    assert max(abs(red - 77), abs(green - 40), abs(blue - 200)) <= 3


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_compression_makes_files_small(output_format: str, noisy: Image.Image) -> None:
    from service.pictures import encode

    assert len(encode(noisy, output_format, 0)) < len(encode(noisy, output_format, 100)) / 2  # type: ignore[arg-type]


@pytest.fixture
def noisy() -> Image.Image:
    return Image.effect_noise((64, 64), 80).convert("RGB")


def test_a_png_tells_how_it_was_drawn(client: TestClient) -> None:
    image = picture(ask(client, seed=7, prompt="röd äpple 🍎")["data"][0])
    facts = json.loads(image.info["fewstep"])
    assert facts["prompt"] == "röd äpple 🍎"
    assert (facts["seed"], facts["steps"], facts["model"], facts["diversity"]) == (7, 4, "student", None)


def test_a_png_can_be_silent(settings: Settings, engine: FakeEngine) -> None:
    with TestClient(create_app(settings.model_copy(update={"picture_metadata": False}), engine)) as client:
        assert "fewstep" not in picture(ask(client)["data"][0]).info


def test_urls(client: TestClient) -> None:
    items = ask(client, response_format="url", n=2, output_format="webp")["data"]
    assert set(items[0]) == {"url", "seed"}
    assert items[0]["url"] != items[1]["url"]
    assert items[0]["url"].startswith("http://testserver/v1/images/files/")
    response = client.get(items[0]["url"])
    assert (response.status_code, response.headers["content-type"]) == (200, "image/webp")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert Image.open(io.BytesIO(response.content)).size == (32, 32)


def test_urls_can_start_elsewhere(settings: Settings, engine: FakeEngine) -> None:
    public = settings.model_copy(update={"public_url": "https://draw.example/fewstep/"})
    with TestClient(create_app(public, engine)) as client:
        url = ask(client, response_format="url")["data"][0]["url"]
    assert url.startswith("https://draw.example/fewstep/v1/images/files/")


@pytest.mark.parametrize("picture_id", ["nobody", "..%2f..%2fetc%2fpasswd", "%00", "../generations"])
def test_no_path_leads_to_the_disk(client: TestClient, picture_id: str) -> None:
    assert client.get(f"/v1/images/files/{picture_id}").status_code in (404, 405)


def test_pictures_expire_and_the_oldest_go_first() -> None:
    now = [0.0]
    store = PictureStore(capacity=30, seconds=10, clock=lambda: now[0])
    first, second, third = (store.put(bytes(10), "png") for _ in range(3))
    assert store.get(first) is not None
    fourth = store.put(bytes(10), "png")
    assert [store.get(each) is not None for each in (first, second, third, fourth)] == [False, True, True, True]
    now[0] = 10.0
    assert store.get(fourth) is None
    assert store.get(store.put(bytes(31), "png")) is None


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "  \n"}, "prompt", "it is blank"),
        ({"prompt": 3}, "prompt", "valid string, got 3"),
        ({"prompt": "x" * 101}, "prompt", "101 characters are too many; at most 100"),
        ({"negative_prompt": "x" * 101}, "negative_prompt", "101 characters are too many"),
        ({"n": 0}, "n", "greater than or equal to 1, got 0"),
        ({"n": 11}, "n", "less than or equal to 10, got 11"),
        ({"n": "2"}, "n", "valid integer, got '2'"),
        ({"n": True}, "n", "valid integer, got True"),
        ({"size": "64"}, "size", "'64' is not a valid size"),
        ({"size": "064x64"}, "size", "is not a valid size"),
        ({"size": "9999999x64"}, "size", "is not a valid size"),
        ({"steps": 0}, "steps", "greater than or equal to 1"),
        ({"steps": 101}, "steps", "less than or equal to 100"),
        ({"steps": 2.5}, "steps", "integer"),
        ({"seed": -1}, "seed", "'-1' is not a valid seed: give an integer from 0 to"),
        ({"seed": 2**53}, "seed", "is not a valid seed"),
        ({"seed": 1.5}, "seed", "'1.5' is not a valid seed"),
        ({"seed": True}, "seed", "'True' is not a valid seed"),
        ({"seed": "7"}, "seed", "'7' is not a valid seed"),
        ({"seed": [1, "2"], "n": 2}, "seed", "'2' is not a valid seed"),
        ({"seed": [1, 2], "n": 3}, "seed", "seed: 2 seed(s) for n = 3 image(s); give 3"),
        ({"seed": [1, 2]}, "seed", "seed: 2 seed(s) for n = 1"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
        ({"guidance_scale": 51}, "guidance_scale", "less than or equal to 50"),
        ({"response_format": "file"}, "response_format", "'b64_json' or 'url', got 'file'"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp', got 'gif'"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "less than or equal to 100"),
        ({"output_compression": 50}, "output_compression", "output_compression: 50 is not supported for a png"),
        ({"background": "transparent"}, "background", "these models fill every pixel"),
        (
            {"partial_images": 2},
            "partial_images",
            "partial_images: only a stream can send partial images",
        ),
        ({"partial_images": 4, "stream": True}, "partial_images", "less than or equal to 3, got 4"),
        (
            {"stream": True, "response_format": "url"},
            "response_format",
            "response_format: a stream contains the images",
        ),
        ({"quality": "ultra"}, "quality", "'high', got 'ultra'"),
        (
            {"diversity": "on"},
            "diversity",
            "true, false, or an object with base_steps, base_guidance, start, skip, until and unprompted, got 'on'",
        ),
        ({"diversity": {"base_steps": 9}}, "diversity.base_steps", "less than or equal to 8, got 9"),
        ({"diversity": {"until": 1}}, "diversity.until", "less than 1, got 1"),
        ({"diversity": {"start": 0}}, "diversity.start", "greater than or equal to 0.001, got 0"),
        ({"diversity": {"unprompted": 1}}, "diversity.unprompted", "less than 1, got 1"),
        ({"diversity": {"steps": 1}}, "diversity.steps", "'diversity.steps': use one of base_steps, base_guidance"),
        ({"setps": 2}, "setps", "unknown parameter(s): 'setps': did you mean steps? Use one of prompt, model, n, "),
        ({"a": 1, "b": 2}, "a", "unknown parameter(s): 'a', 'b'; for 'a': use one of prompt, "),
        ({"x" * 500: 1}, "x" * 80, "unknown parameter(s)"),
    ],
)
def test_what_is_refused(
    client: TestClient, engine: FakeEngine, fields: dict[str, Any], param: str | None, says: str
) -> None:
    response = client.post(URL, json={"prompt": "red apple", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert says in error["message"]
    assert len(error["message"]) < 400
    assert engine.asked == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(client: TestClient, number: str) -> None:
    content = f'{{"prompt": "x", "guidance_scale": {number}}}'
    response = client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guidance_scale")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_text_that_is_none(client: TestClient, field: str) -> None:
    content = json.dumps({"prompt": "x", field: "half a pair: \ud83d"})
    response = client.post(URL, content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_several_mistakes_are_named_together(client: TestClient) -> None:
    error = client.post(URL, json={"n": 99, "size": "big"}).json()["error"]
    assert "prompt is required" in error["message"]
    assert "n: " in error["message"]
    assert "size: " in error["message"]


def test_a_client_that_goes_away_is_forgotten(settings: Settings, engine: FakeEngine) -> None:
    """The app as a server calls it: the connection closes while the engine draws."""
    drawing = asyncio.Event()

    async def forever() -> None:
        drawing.set()
        await asyncio.sleep(60)

    engine.hold = forever
    app = create_app(settings, engine)
    body = json.dumps({"prompt": "red apple"}).encode()
    sent: list[dict[str, Any]] = []

    async def call() -> None:
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            message = next(messages, None)
            if message is not None:
                return message
            await drawing.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": URL,
            "raw_path": URL.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        await asyncio.wait_for(app(scope, receive, send), 10)  # type: ignore[arg-type]

    asyncio.run(call())
    assert engine.dropped.is_set()
    assert sent[0]["status"] == 499


@pytest.mark.parametrize(
    ("output_format", "side", "elsewhere"),
    [("png", 64, False), ("jpeg", 64, False), ("png", 128, True), ("webp", 32, True)],
)
def test_small_pictures_are_encoded_at_once_and_others_on_threads_of_their_own(
    output_format: str, side: int, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = ImageRequest(prompt="x", output_format=output_format)
    colours = ["red", "green", "blue", "white"]
    pictures = [(Image.new("RGB", (side, side), colour), {"seed": number}) for number, colour in enumerate(colours)]
    wanted = [routes.file_of(body, *each) for each in pictures]
    assert len(set(wanted)) == len(colours)
    threads: list[threading.Thread] = []
    together = threading.Barrier(len(pictures), timeout=30)
    right = routes.file_of

    def watched(*given: Any) -> bytes:
        threads.append(threading.current_thread())
        if elsewhere:
            together.wait()  # passes only where all of them are at it at the same time
        return right(*given)

    monkeypatch.setattr(routes, "file_of", watched)
    assert asyncio.run(routes.files_of(body, pictures)) == wanted
    assert (threading.main_thread() not in threads) == elsewhere
    assert len(set(threads)) == (len(pictures) if elsewhere else 1)
