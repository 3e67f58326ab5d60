"""What is remembered of the store: fresh, without the disk, and right whatever the disk does."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.engine import step_engine
from service.engine.aside import Aside
from service.engine.base import TimedOut
from service.engine.recent import AGAIN_SECONDS, FRESH_SECONDS, IN_USE_SECONDS, Recent, Unseen
from service.engine.step_engine import LOOKS, StepEngine
from tests.service.conftest import TinyBase
from tests.service.engine_help import Harness, request, until
from tests.service.live import serving
from weights.store import Corrupt, NotFound, Store, StudentFolder, Unreadable


class Slow(Store):
    """A store that counts how often it is asked, and does not answer while it is told not to."""

    def __init__(self, root: Path, bundled: Path | None = None) -> None:
        super().__init__(root, bundled)
        self.asked: list[str] = []
        self.answers = threading.Event()
        self.answers.set()

    def find(self, name: str) -> StudentFolder:
        self.asked.append(name)
        assert self.answers.wait(120)
        return super().find(name)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tiny_base: TinyBase, tmp_path: Path) -> Slow:
    store = Slow(tmp_path / "store")
    tiny_base.publish(store, tmp_path / "work")
    return store


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recent(store: Slow, clock: Clock) -> Iterator[Recent]:
    made = Recent(store, clock)
    yield made
    made.stop()


def test_the_disk_is_asked_once_while_an_answer_is_fresh(recent: Recent, store: Slow, clock: Clock) -> None:
    assert not recent.knows("tiny")
    first = recent.find("tiny")
    assert first.manifest == store.manifest("tiny")
    asked = len(store.asked)
    clock.now += FRESH_SECONDS
    assert recent.knows("tiny")
    assert recent.find("tiny") is first
    assert len(store.asked) == asked
    clock.now += 0.01
    assert not recent.knows("tiny")
    recent.find("tiny")
    assert len(store.asked) == asked + 1


def test_what_is_there_no_more_is_an_error_once_it_is_not_fresh(recent: Recent, store: Slow, clock: Clock) -> None:
    with pytest.raises(NotFound):
        recent.find("nobody")
    assert not recent.knows("nobody")
    recent.find("tiny")
    store.delete("tiny")
    recent.look_again()
    assert not recent.knows("tiny")
    with pytest.raises(NotFound):
        recent.find("tiny")


@pytest.mark.parametrize(
    ("error", "known"),
    [(Unreadable("EIO"), True), (OSError("EIO"), True), (Corrupt("damaged"), False), (NotFound("deleted"), False)],
)
def test_a_disk_that_fails_takes_no_student_from_those_who_use_it(
    recent: Recent, store: Slow, monkeypatch: pytest.MonkeyPatch, error: Exception, known: bool
) -> None:
    def fail(_: str) -> StudentFolder:
        raise error

    recent.find("tiny")
    monkeypatch.setattr(store, "find", fail)
    recent.look_again()
    assert recent.knows("tiny") == known


def test_what_is_in_use_stays_fresh_until_nobody_asks(recent: Recent, clock: Clock) -> None:
    recent.find("tiny")
    started = clock.now
    while clock.now + AGAIN_SECONDS < started + IN_USE_SECONDS:
        clock.now += AGAIN_SECONDS
        recent.look_again()
        assert recent.knows("tiny")
    clock.now = started + IN_USE_SECONDS + 1
    recent.look_again()
    assert not recent.knows("tiny")


def test_a_student_published_anew_is_seen(
    recent: Recent, store: Slow, clock: Clock, tiny_base: TinyBase, tmp_path: Path
) -> None:
    before = recent.find("tiny")
    tiny_base.publish(store, tmp_path / "other", method="another")
    assert recent.find("tiny") is before, "it is fresh"
    recent.look_again()
    assert recent.find("tiny").manifest.method == "another"


def test_a_look_that_took_long_hides_no_later_one(
    recent: Recent, store: Slow, clock: Clock, tiny_base: TinyBase, tmp_path: Path
) -> None:
    recent.find("tiny")
    old = Store.find(store, "tiny")
    begun, go_on = threading.Event(), threading.Event()

    def late(name: str) -> StudentFolder:
        begun.set()
        assert go_on.wait(120)
        return old

    store.find = late  # type: ignore[method-assign]
    looking = threading.Thread(target=recent.look_again)
    looking.start()
    assert begun.wait(120)
    del store.find  # type: ignore[method-assign]
    clock.now += 2 * FRESH_SECONDS
    tiny_base.publish(store, tmp_path / "other", method="another")
    assert recent.find("tiny").manifest.method == "another"
    go_on.set()
    looking.join()
    assert recent.find("tiny").manifest.method == "another"


def test_the_thread_looks_again_and_an_error_does_not_end_it(store: Slow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.recent.AGAIN_SECONDS", 0.001)
    recent, looks = Recent(store), threading.Semaphore(0)

    def fail() -> None:
        looks.release()
        raise RuntimeError("on purpose")

    monkeypatch.setattr(recent, "look_again", fail)
    recent.start()
    try:
        recent.find("tiny")
        assert all(looks.acquire(timeout=120) for _ in range(3))
    finally:
        recent.stop()
        recent._thread.join(120)
    assert not recent._thread.is_alive()


def test_while_a_look_is_under_way_what_was_seen_last_is_good_enough(recent: Recent, store: Slow, clock: Clock) -> None:
    recent.find("tiny")
    store.answers.clear()
    asked = len(store.asked) + 1
    recent.start()
    try:
        until = time.monotonic() + 60
        while len(store.asked) < asked and time.monotonic() < until:
            time.sleep(0.002)
        clock.now += 100 * FRESH_SECONDS
        assert recent.knows("tiny")
        assert [recent.find("tiny").manifest.name for _ in range(10)] == ["tiny"] * 10
        assert recent.last("tiny").manifest.name == "tiny"
        assert len(store.asked) == asked, "one look that hangs is enough"
        with pytest.raises(Unseen):
            recent.last("nobody")
    finally:
        store.answers.set()


def test_what_was_opened_is_known(recent: Recent, store: Slow) -> None:
    assert recent.open("tiny") == store.open("tiny")
    asked = len(store.asked)
    assert recent.last("tiny") is recent.find("tiny")
    assert len(store.asked) == asked


@pytest.fixture
def hanging(tiny_base: TinyBase, tmp_path: Path) -> tuple[Harness, Slow]:
    """An engine over a store that can hang, the first of whose bundled students is the default."""
    bundled = Store(tmp_path / "bundled")
    tiny_base.publish(bundled, tmp_path / "work", "tiny")
    tiny_base.publish(bundled, tmp_path / "work-too", "tiny-too")  # another that could be the default
    harness = Harness(tiny_base, tmp_path, bundled=bundled.root, max_batch=2)
    for name in ("other", "another"):
        harness.publish(name)
    store = Slow(harness.store.root, bundled.root)
    residency = harness.engine._residency
    harness.engine._recent._store = residency._store = residency._catalog._store = store
    return harness, store


async def until_stale() -> None:
    await asyncio.sleep(1.2 * FRESH_SECONDS)


@pytest.mark.usefixtures("loaded_once")
@pytest.mark.parametrize("model", ["tiny", None], ids=["by its name", "as the default"])
def test_a_disk_that_hangs_holds_up_nobody_whose_student_is_in_use(
    model: str | None, hanging: tuple[Harness, Slow]
) -> None:
    harness, store = hanging

    async def scenario(engine: StepEngine) -> None:
        await engine.generate(request(model=model))
        store.answers.clear()
        try:
            await until_stale()
            await engine.generate(request(model=model))
            waiting = asyncio.create_task(engine.generate(request(model="other")))
            await until(lambda: "other" in store.asked)
            await engine.generate(request(model=model))
            assert not waiting.done()
        finally:
            store.answers.set()
        await waiting

    harness.run(scenario)


@pytest.mark.usefixtures("loaded_once")
def test_looks_that_hang_take_no_thread_from_anybody_else(hanging: tuple[Harness, Slow]) -> None:
    harness, store = hanging

    async def scenario(engine: StepEngine) -> None:
        await engine.generate(request(model="tiny"))
        store.answers.clear()
        try:
            names = ["other", "another"] * 25
            waiting = [asyncio.create_task(engine.generate(request(model=name))) for name in names]
            await until(lambda: {"other", "another"} <= set(store.asked))
            assert await asyncio.to_thread(lambda: "free") == "free"
            assert len(await engine.generate(request(model="tiny"))) == 1
            assert sum(name in names for name in store.asked) <= LOOKS
            with pytest.raises(TimedOut, match=r"model store did not respond within the request's 0\.05 s"):
                await engine.generate(request(model="other", seconds=0.05))
        finally:
            store.answers.set()
        assert {len(each) for each in await asyncio.gather(*waiting)} == {1}

    harness.run(scenario)


@pytest.mark.usefixtures("loaded_once")
def test_models_are_listed_or_the_store_is_said_to_hang(
    hanging: tuple[Harness, Slow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bounded time, however many ask; and as soon as it answers again."""
    harness, store = hanging
    with serving(create_app(harness.settings, harness.engine)) as url:
        known = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        assert {"tiny", "other"} < set(known)
        store.answers.clear()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(step_engine, "LIST_SECONDS", 0.05)
                for path in ("", "/tiny", *[""] * 2 * step_engine.LISTS):
                    answer = httpx.get(f"{url}/v1/models{path}", timeout=30)
                    error = answer.json()["error"]
                    assert (answer.status_code, error["type"], error["code"]) == (504, "server_error", "timeout")
                    assert "model store did not respond within 0.05 s" in error["message"]
        finally:
            store.answers.set()
        assert [model["id"] for model in httpx.get(f"{url}/v1/models", timeout=30).json()["data"]] == known


def test_what_is_done_aside_answers_and_fails_as_it_is() -> None:
    async def scenario() -> None:
        aside = Aside(1)
        assert await aside.run(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await aside.run(divmod, 7, 0)
        go_on = threading.Event()
        hangs = asyncio.create_task(aside.run(go_on.wait, 120))
        await asyncio.sleep(0)
        hangs.cancel()
        waits = asyncio.create_task(aside.run(divmod, 7, 2))
        with pytest.raises(asyncio.CancelledError):
            await hangs
        assert not waits.done(), "it goes on, and counts"
        with pytest.raises(TimeoutError):
            await aside.within(0.01, divmod, 7, 2)
        go_on.set()
        assert await waits == (3, 1)
        assert await aside.within(60, divmod, 7, 2) == (3, 1)

    asyncio.run(scenario())
