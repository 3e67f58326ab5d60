"""What the engine's tests share: an engine over a tiny real base, and an observer that counts calls and can stop time."""

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from service.engine.backends.base import Backend
from service.engine.base import DiversityWish, Drawn, DrawRequest, Preview
from service.engine.costs import CostProfile, Costs, Part
from service.engine.line import Line
from service.engine.observer import Call, Outcome
from service.engine.recent import FRESH_SECONDS
from service.engine.startup import families_of_bases
from service.engine.step_engine import StepEngine
from service.settings import Settings
from tests.service.as_loaded import AsLoaded
from tests.service.conftest import TinyBase
from weights.store import Store

T = TypeVar("T")


def request(**fields: Any) -> DrawRequest:
    return DrawRequest(**{"prompt": "red apple", "model": "tiny", "seeds": (1,), **fields})


def mixture(base: TinyBase) -> list[DrawRequest]:
    """Pictures that differ in all that may differ within a call."""
    return [
        request(seeds=(1, 2)),
        request(prompt="blue dog", seeds=(3,), guidance_scale=4.0, steps=2),
        request(prompt="green tree", seeds=(4, 5), diversity=DiversityWish()),
        request(prompt="blue dog", seeds=(6,), steps=1, guidance_scale=0.0),
        request(prompt="red dog", seeds=(7,), guidance_scale=2.0, negative_prompt="cat"),
        request(model=base.id, prompt="green tree", seeds=(8, 9), steps=2),
    ]


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what another thread does, which sets no asyncio.Event."""
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def until_seen() -> None:
    """From here on the engine knows what the store held when this was called."""
    await asyncio.sleep(FRESH_SECONDS)


def pixels(drawn: list[Drawn]) -> list[bytes]:
    return [item.image.tobytes() for item in drawn]


async def collect(engine: StepEngine, asked: DrawRequest) -> list[Preview | Drawn]:
    return [answer async for answer in engine.stream(asked)]


class Watch:
    """An observer that writes everything down, and holds the engine's thread after a call for as long as it is shut."""

    def __init__(self) -> None:
        self.calls: list[tuple[Call, str, int, int]] = []
        self.ends: list[tuple[Outcome, int]] = []
        self._shut = False
        self._permits = threading.Semaphore(0)

    def called(self, call: Call, model: str, rows: int, batch: int, seconds: float) -> None:
        assert seconds > 0
        self.calls.append((call, model, rows, batch))
        assert not self._shut or self._permits.acquire(timeout=120)

    def ended(self, outcome: Outcome, pictures: int, waited: float, seconds: float) -> None:
        assert 0 <= waited <= seconds
        self.ends.append((outcome, pictures))

    def shut(self) -> None:
        """The next call is the last one until `open`, or `step`."""
        self.calls.clear()
        self._permits = threading.Semaphore(0)
        self._shut = True

    def open(self) -> None:
        self._shut = False
        self._permits.release()

    async def step(self) -> None:
        """One more call."""
        made = len(self.calls)
        self._permits.release()
        await until(lambda: len(self.calls) > made)

    async def held(self) -> None:
        """Returns when a call was made since it was shut."""
        await until(lambda: bool(self.calls))

    def rows(self, call: Call) -> Counter[int]:
        """How many calls had so many rows."""
        return Counter(rows for kind, _, rows, _ in self.calls if kind == call)


class Still(Costs):
    """Costs that nothing changes, no measurement either: full batches are always best, on every machine."""

    def put(self, part: Part, seconds: Mapping[int, float]) -> CostProfile:
        return self.of(part)

    def observe(self, part: Part, batch: int, seconds: float) -> None:
        pass


class Harness:
    """An engine over a store of its own."""

    def __init__(
        self,
        base: TinyBase,
        folder: Path,
        *,
        backend: Backend | None = None,
        bundled: Path | None = None,
        **fields: Any,
    ) -> None:
        self.base, self.folder = base, folder
        self.store = Store(folder / "store", bundled)
        values = {"store": folder / "store", "jobs_dir": folder / "jobs", "bases": [base.id], "device": "cpu"}
        self.settings = Settings(**{**values, **fields})
        self.watch = Watch()
        backend = backend if backend is not None else AsLoaded(self.settings.max_batch)
        self.line = Line(self.settings.queue_seconds)
        self.engine = StepEngine(
            self.settings,
            self.store,
            bundled,
            listed=families_of_bases(self.settings),
            backend=backend,
            costs=Still(backend.batches, math.inf),
            line=self.line,
            observer=self.watch,
        )

    def publish(self, name: str = "tiny", **fields: Any) -> None:
        self.base.publish(self.store, self.folder / "work" / name, name, **fields)

    def run(self, scenario: Callable[[StepEngine], Awaitable[T]]) -> T:
        async def whole() -> T:
            await self.engine.start()
            try:
                await until(lambda: self.engine.ready or self.engine.failure is not None)
                self.watch.calls.clear()
                return await asyncio.wait_for(scenario(self.engine), 120)
            finally:
                self.watch.open()
                await self.engine.stop()

        return asyncio.run(whole())

    def draw(self, **fields: Any) -> list[Drawn]:
        return self.run(lambda engine: engine.generate(request(**fields)))

    async def arrived(self, count: int) -> None:
        """Returns when so many requests are with the engine's thread, which is held."""
        await until(lambda: self.engine._thread._inbox.qsize() == count)

    async def together(self, *asked: DrawRequest, return_exceptions: bool = False) -> list[Any]:
        """Each one's pictures; the first is a call ahead of the others, which are all there for the second call."""
        self.watch.shut()
        first = asyncio.create_task(self.engine.generate(asked[0]))
        await self.watch.held()
        others = []
        for each in asked[1:]:  # one after another, so that they stand in the line in this order
            others.append(asyncio.create_task(self.engine.generate(each)))
            await self.arrived(len(others))
        self.watch.open()
        return await asyncio.gather(first, *others, return_exceptions=return_exceptions)
