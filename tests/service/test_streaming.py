"""Streams of pictures, and requests that are cancelled: over real connections, which can be left at any time."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from service.app import create_app
from service.engine.base import BadRequest, EngineError, Overloaded, TimedOut
from service.running import Running
from service.settings import Settings
from service.streaming import Awaited
from tests.service.answers import picture
from tests.service.conftest import FakeEngine
from tests.service.live import serving

URL = "/v1/images/generations"


@dataclass
class Live:
    """A server, its parts, and a client of it."""

    app: FastAPI
    engine: FakeEngine
    http: httpx.Client

    def post(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        return self.http.post(URL, json={"prompt": "red apple", "steps": 4, **fields}, headers=headers)

    def hold(self) -> "tuple[threading.Event, Callable[[], None]]":
        """From now on the engine waits before each picture: set once it does, and what lets it go on."""
        waiting, go_on = threading.Event(), threading.Event()

        async def wait() -> None:
            waiting.set()
            while not go_on.is_set():  # noqa: ASYNC110 - set by another thread
                await asyncio.sleep(0.005)

        self.engine.hold = wait
        return waiting, go_on.set


@pytest.fixture
def live(settings: Settings, engine: FakeEngine) -> Iterator[Live]:
    app = create_app(settings.model_copy(update={"heartbeat_seconds": 0.05}), engine)
    with serving(app) as address, httpx.Client(base_url=address, timeout=30) as http:
        yield Live(app, engine, http)


@pytest.fixture
def another_thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Every event with its name; comments are left out."""
    found = []
    for frame in text.split("\n\n"):
        if frame and not frame.startswith(":"):
            name, data = frame.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def test_a_stream_brings_states_and_then_the_picture(live: Live) -> None:
    response = live.post(stream=True, partial_images=2, seed=7)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    (first, one), (second, two), (last, done) = events(response.text)
    assert (first, second, last) == (*["image_generation.partial_image"] * 2, "image_generation.completed")
    assert [(each["partial_image_index"], each["step"], each["steps"]) for each in (one, two)] == [(0, 1, 4), (1, 2, 4)]
    for name, event in ((first, one), (second, two), (last, done)):
        assert event["type"] == name
        assert (event["seed"], event["picture_index"], event["output_format"]) == (7, 0, "png")
        assert (event["size"], event["background"], event["quality"]) == ("32x32", "opaque", "auto")
        assert abs(event["created_at"] - time.time()) < 60
    assert [picture(each).getpixel((0, 0)) for each in (one, two, done)] == [(1, 1, 1), (2, 2, 2), (7, 40, 200)]
    assert (done["model"], done["drawing"]["steps"]) == ("student", 4)
    assert "fewstep" in picture(done).info and "fewstep" not in picture(one).info


def test_the_streamed_picture_is_the_one_that_is_answered_whole(live: Live) -> None:
    fields = {"seed": 9, "output_format": "webp", "output_compression": 80}
    ((_, done),) = events(live.post(stream=True, **fields).text)
    assert done["b64_json"] == live.post(**fields).json()["data"][0]["b64_json"]


def test_pictures_come_as_they_are_done_and_say_which_they_are(live: Live) -> None:
    found = [event for _, event in events(live.post(stream=True, partial_images=1, n=3, seed=[5, 6, 7]).text)]
    told = [(each["picture_index"], each["seed"], each.get("partial_image_index")) for each in found]
    assert told == [(2, 7, 0), (2, 7, None), (1, 6, 0), (1, 6, None), (0, 5, 0), (0, 5, None)]


def test_previews_are_asked_of_the_engine_as_the_client_asks(live: Live) -> None:
    live.post(stream=True, partial_images=3)
    live.post(stream=True)
    live.post()
    assert [(each.previews, each.exact_previews) for each in live.engine.asked] == [(3, False), (0, False), (0, False)]


@pytest.mark.parametrize(
    ("raised", "status"), [(BadRequest("no", "steps"), 400), (Overloaded("full", 7), 429), (TimedOut("late"), 504)]
)
def test_an_error_before_the_first_event_is_an_ordinary_answer(live: Live, raised: EngineError, status: int) -> None:
    live.engine.error = raised
    response = live.post(stream=True)
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    assert response.json()["error"]["message"] == str(raised)
    assert response.headers.get("retry-after") == ("7" if status == 429 else None)
    assert len(live.app.state.running) == 0


def test_a_later_error_is_the_last_event(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    failed = EngineError("failed")
    failed.__cause__ = ValueError("why it failed")
    live.engine.late_error = failed
    assert events(live.post(stream=True, n=2).text)[-1][1]["error"]["code"] == "engine_error"
    assert "why it failed" in caplog.text, "the log has the cause, as it has for an answer that is no stream"
    live.engine.late_error = TimedOut("late")
    (_, (name, data)) = events(live.post(stream=True, n=2).text)
    assert (name, data) == (
        "error",
        {"error": {"message": "late", "type": "server_error", "param": None, "code": "timeout"}},
    )
    live.engine.late_error = RuntimeError("secret detail")
    text = live.post(stream=True, n=2).text
    assert events(text)[-1][1]["error"]["code"] == "internal_error"
    assert "secret" not in text


def test_silence_is_filled_with_comments(live: Live) -> None:
    waiting, go_on = live.hold()
    with live.http.stream("POST", URL, json={"prompt": "x", "stream": True}) as response:
        lines = response.iter_lines()
        assert waiting.is_set()
        assert [next(lines), next(lines), next(lines)] == [": still at work", "", ": still at work"]
        assert response.headers["x-request-id"]
        go_on()
        rest = list(lines)
    assert "event: image_generation.completed" in rest


def test_a_reader_that_goes_away_ends_the_drawing(live: Live) -> None:
    live.hold()
    with live.http.stream("POST", URL, json={"prompt": "x", "stream": True}) as response:
        lines = response.iter_lines()  # kept: a reader of lines that is dropped closes the connection
        next(lines)
        assert len(live.app.state.running) == 1
    assert live.engine.dropped.wait(10)
    until(lambda: len(live.app.state.running) == 0)


def test_a_reader_that_goes_away_before_the_first_event(settings: Settings, engine: FakeEngine) -> None:
    app = create_app(settings, engine)  # whose heartbeat comes late
    with serving(app) as address, httpx.Client(base_url=address) as http:
        waiting, _ = Live(app, engine, http).hold()
        with pytest.raises(httpx.ReadTimeout):
            http.post(URL, json={"prompt": "x", "stream": True}, timeout=0.3)
        assert waiting.is_set()
        assert engine.dropped.wait(10)
        until(lambda: len(app.state.running) == 0)


def test_cancelling_a_stream(live: Live, another_thread: ThreadPoolExecutor) -> None:
    waiting, _ = live.hold()
    answer = another_thread.submit(live.post, {"X-Request-ID": "mine-1"}, stream=True)
    until(waiting.is_set)
    time.sleep(0.1)  # the stream has begun: it has sent a comment
    assert live.http.delete(f"{URL}/mine-1").status_code == 204
    response = answer.result(10)
    assert (response.status_code, response.headers["x-request-id"]) == (200, "mine-1")
    ((name, data),) = events(response.text)
    assert (name, data["error"]["code"], data["error"]["type"]) == ("error", "cancelled", "invalid_request_error")
    assert live.engine.dropped.wait(10)


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_cancelling_before_there_is_an_answer(
    settings: Settings, engine: FakeEngine, another_thread: ThreadPoolExecutor, fields: dict[str, Any]
) -> None:
    app = create_app(settings, engine)
    with serving(app) as address, httpx.Client(base_url=address, timeout=30) as http:
        live = Live(app, engine, http)
        live.hold()
        answers: list[Future[httpx.Response]] = [
            another_thread.submit(live.post, {"X-Request-ID": "twice"}, **fields) for _ in range(2)
        ]
        until(lambda: len(app.state.running) == 2)
        assert http.delete(f"{URL}/twice").status_code == 204
        for answer in answers:
            response = answer.result(10)
            assert (response.status_code, response.json()["error"]["code"]) == (499, "cancelled")
        assert engine.dropped.is_set()
        again = http.delete(f"{URL}/twice")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")
    assert "'twice'" in again.json()["error"]["message"]


def test_nobody_cancels_what_another_client_asked_for() -> None:
    async def two_clients() -> None:
        running = Running()
        with running.enter("one", "id") as first, running.enter("two", "id") as second:
            assert not running.cancel("three", "id")
            assert not running.cancel("one", "other")
            assert running.cancel("two", "id")
            assert running.cancel("two", "id"), "as often as one likes, while it is in progress"
            assert (first.done(), second.done()) == (False, True)
        assert not running.cancel("one", "id")
        assert len(running) == 0

    asyncio.run(two_clients())


def test_a_wait_that_gives_up_loses_no_item_and_closing_ends_all() -> None:
    closed = []

    async def numbers() -> Any:
        try:
            for number in range(3):
                await asyncio.sleep(0.01)
                yield number
            await asyncio.sleep(60)
        finally:
            closed.append(True)

    async def scenario() -> None:
        items = Awaited(numbers())
        got = []
        while len(got) < 3:
            task = items.next()
            await asyncio.wait({task}, timeout=0.001)
            if task.done():
                got.append(items.taken())
        assert got == [0, 1, 2]
        items.next()
        await asyncio.sleep(0)
        await items.aclose()
        assert closed == [True]

    asyncio.run(scenario())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
