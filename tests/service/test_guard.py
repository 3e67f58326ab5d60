"""The safety checker and what becomes of flagged pictures, whichever way they are drawn."""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from service import safety
from service.app import create_app
from service.engine.base import Drawn, DrawRequest, EngineError, Flagged, NotReady, Preview, TimedOut
from service.guard import CHECKS, GuardedEngine
from service.rates import Limits, RateLimited, Rates
from service.safety import Checker, load_checker
from service.settings import BadSettings, Settings
from tests.service.answers import picture
from tests.service.conftest import FakeEngine

DRAW = "/v1/images/generations"
REQUEST = DrawRequest(prompt="red apple", seeds=(1, 2, 3), client="ann", previews=1)
BLACK = ((0, 0), (0, 0), (0, 0))


def flags_two(image: Image.Image, prompt: str) -> bool:
    """FakeEngine paints a seed as the amount of red."""
    assert prompt == "red apple"
    return image.getpixel((0, 0))[0] == 2  # type: ignore[index]


def fails(image: Image.Image, prompt: str) -> bool:
    raise ValueError(f"cannot read {prompt}")


def leaves(image: Image.Image, prompt: str) -> bool:
    raise SystemExit(3)


def told_its_thread(image: Image.Image, prompt: str) -> bool:
    return not threading.current_thread().name.startswith("aside")


go_on = threading.Event()


def hangs(image: Image.Image, prompt: str) -> bool:
    """Until the test is over."""
    assert go_on.wait(120)
    return False


not_callable = "text"


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installed package would offer."""
    go_on.clear()
    functions = {"two": flags_two, "fails": fails, "leaves": leaves, "aside": told_its_thread, "hangs": hangs}
    names = {name: f"{__name__}:{function.__name__}" for name, function in functions.items()}
    names["text"] = f"{__name__}:not_callable"
    points = [EntryPoint(name, value, safety.GROUP) for name, value in {**names, "gone": "no.such.module:f"}.items()]
    monkeypatch.setattr(safety, "entry_points", lambda group: EntryPoints(points).select(group=group))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "nobody",
            "offers 'nobody' as fewstep.safety; available: aside, fails, gone, hangs, leaves, text, two",
        ),
        ("gone", "'gone' cannot be loaded: No module named 'no'"),
        ("text", "is not a function of an image and a prompt"),
    ],
)
@pytest.mark.usefixtures("offered")
def test_a_checker_that_is_not_there_stops_the_start(
    settings: Settings, engine: FakeEngine, name: str, says: str
) -> None:
    with pytest.raises(BadSettings, match=says):
        create_app(settings.model_copy(update={"safety_checker": name}), engine)


def checked(settings: Settings, engine: FakeEngine, **fields: Any) -> TestClient:
    return TestClient(create_app(settings.model_copy(update={"safety_checker": "two", **fields}), engine))


@pytest.mark.usefixtures("offered")
def test_a_flagged_picture_refuses_the_request(settings: Settings, engine: FakeEngine) -> None:
    with checked(settings, engine, pictures_per_minute=10) as client:
        fine = client.post(DRAW, json={"prompt": "red apple", "seed": [1, 3], "n": 2})
        assert fine.status_code == 200
        assert "flagged" not in fine.json()["data"][0]
        refused = client.post(DRAW, json={"prompt": "red apple", "seed": 1, "n": 3})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (400, "content_policy_violation", "prompt")
    assert "'two'" in error["message"]
    assert refused.headers["x-ratelimit-remaining-images"] == "5"  # it was drawn all the same


@pytest.mark.usefixtures("offered")
def test_a_flagged_picture_can_be_blanked(settings: Settings, engine: FakeEngine) -> None:
    with checked(settings, engine, safety_flagged="blanked") as client:
        items = client.post(DRAW, json={"prompt": "red apple", "seed": 1, "n": 3}).json()["data"]
    images = [picture(item) for item in items]
    assert [image.getpixel((0, 0)) for image in images] == [(1, 40, 200), (0, 0, 0), (3, 40, 200)]
    assert images[1].getextrema() == BLACK
    assert [item.get("flagged") for item in items] == [None, True, None]


@pytest.mark.usefixtures("offered")
def test_a_slow_checker_has_threads_of_its_own(settings: Settings, engine: FakeEngine) -> None:
    """asyncio's are few, and all that waits for a disk or the job table needs them."""
    with checked(settings, engine, safety_checker="aside") as client:
        assert client.post(DRAW, json={"prompt": "red apple"}).status_code == 200


@pytest.mark.usefixtures("offered")
@pytest.mark.parametrize("stream", [False, True])
def test_a_checker_that_hangs_holds_no_request_beyond_its_time(
    settings: Settings, engine: FakeEngine, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """However many do, and though their threads hang on; nothing unchecked is shown."""
    body = {"prompt": "red apple", "n": 2, "stream": stream}
    try:
        with checked(settings, engine, safety_checker="hangs", request_timeout=0.1) as client:
            for _ in range(CHECKS + 1):
                answer = client.post(DRAW, json=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
                assert "'hangs' did not respond within the request's 0.1 s" in answer.json()["error"]["message"]
            assert client.get("/v1/models").status_code == 200
    finally:
        go_on.set()
    assert "red apple" not in caplog.text


def test_a_request_that_has_less_time_gives_its_checks_no_more(engine: FakeEngine) -> None:
    go_on.clear()
    try:
        guarded = GuardedEngine(engine, Rates(lambda _: Limits()), Checker(name="c", function=hangs), seconds=300)
        for work in (guarded.generate, partial(collect, guarded)):
            with pytest.raises(TimedOut, match=r"'c' did not respond within the request's 0\.1 s"):
                asyncio.run(asyncio.wait_for(work(replace(REQUEST, seconds=0.1)), 60))
    finally:
        go_on.set()


@pytest.mark.parametrize(("name", "error"), [("fails", "ValueError"), ("leaves", "SystemExit")])
@pytest.mark.usefixtures("offered")
def test_a_checker_that_fails_lets_nothing_out(
    settings: Settings, engine: FakeEngine, caplog: pytest.LogCaptureFixture, name: str, error: str
) -> None:
    with checked(settings, engine, safety_checker=name) as client:
        answer = client.post(DRAW, json={"prompt": "red apple"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    assert f"{name!r} failed" in answer.json()["error"]["message"]
    assert f"failed with {error}" in caplog.text
    assert "red apple" not in caplog.text
    assert logging.ERROR in {record.levelno for record in caplog.records}


async def collect(guarded: GuardedEngine, request: DrawRequest = REQUEST) -> list[Preview | Drawn]:
    return [item async for item in guarded.stream(request)]


def guard(
    engine: FakeEngine, function: Callable[[Image.Image, str], bool] | None = None, **fields: Any
) -> GuardedEngine:
    checker = Checker(name="c", function=function) if function is not None else None
    return GuardedEngine(engine, Rates(lambda _: Limits(**fields)), checker, "blanked")


def test_a_stream_is_checked_preview_by_preview(engine: FakeEngine) -> None:
    plain = asyncio.run(collect(guard(engine)))
    seen = asyncio.run(collect(guard(engine, flags_two)))
    assert [(type(item), item.seed) for item in seen] == [(type(item), item.seed) for item in plain]
    assert {type(item) for item in seen} == {Preview, Drawn}
    for before, after in zip(plain, seen, strict=True):
        flagged = flags_two(before.image, "red apple")
        assert after.image.getextrema() == (BLACK if flagged else before.image.getextrema())
        if isinstance(after, Drawn):
            assert after.flagged == flagged
    every = GuardedEngine(engine, Rates(lambda _: Limits()), Checker(name="c", function=lambda *_: True), "refused")
    with pytest.raises(Flagged, match="'c' flagged"):
        asyncio.run(collect(every))


def test_a_stream_costs_its_pictures(engine: FakeEngine) -> None:
    guarded = guard(engine, pictures_per_minute=3)
    asyncio.run(collect(guarded))
    with pytest.raises(RateLimited):
        asyncio.run(collect(guarded))
    refusing = guard(engine, pictures_per_minute=3)
    engine.error = NotReady("not yet")
    for _ in range(3):
        with pytest.raises(NotReady, match="not yet"):
            asyncio.run(collect(refusing))
    engine.error = None
    assert len(asyncio.run(collect(refusing))) == len(asyncio.run(collect(guard(engine))))


def test_closing_the_stream_closes_the_engines(engine: FakeEngine) -> None:
    closed = []

    class Endless(FakeEngine):
        async def stream(self, request: DrawRequest) -> Any:
            try:
                while True:
                    yield (await engine.generate(request))[0]
            finally:
                closed.append(request)

    async def look_once() -> None:
        items: Any = guard(Endless()).stream(REQUEST)
        await anext(items)
        assert closed == []
        await items.aclose()

    asyncio.run(look_once())
    assert closed == [REQUEST]


def test_nothing_new_is_drawn_once_it_drains(engine: FakeEngine) -> None:
    guarded = guard(engine)

    async def scenario() -> None:
        assert guarded.ready
        await guarded.drain(1)
        assert not guarded.ready
        with pytest.raises(NotReady, match="stopping"):
            await guarded.generate(REQUEST)
        with pytest.raises(NotReady, match="stopping"):
            await collect(guarded)

    asyncio.run(scenario())
    assert engine.life == ["engine drained"]
    assert engine.asked == []


def test_a_drain_waits_for_checks(engine: FakeEngine) -> None:
    """The engine, which has drawn the images, is idle."""
    begun, may_end = threading.Event(), threading.Event()

    def slow(image: Image.Image, prompt: str) -> bool:
        begun.set()
        assert may_end.wait(60)
        return False

    async def scenario() -> None:
        guarded = guard(engine, slow)
        asked = asyncio.create_task(guarded.generate(REQUEST))
        assert await asyncio.to_thread(begun.wait, 60)
        await guarded.drain(0.05)
        assert not asked.done(), "it waits no longer than it may"
        draining = asyncio.create_task(guarded.drain(60))
        await asyncio.sleep(0.05)
        assert not draining.done()
        may_end.set()
        await draining
        assert len(await asked) == len(REQUEST.seeds)

    try:
        asyncio.run(scenario())
    finally:
        may_end.set()


@pytest.mark.usefixtures("offered")
def test_a_loaded_checker_is_the_function() -> None:
    checker = load_checker("two")
    assert (checker.name, checker.flags(Image.new("RGB", (1, 1), (2, 0, 0)), "red apple")) == ("two", True)
    with pytest.raises(EngineError):
        load_checker("fails").flags(Image.new("RGB", (1, 1)), "x")
