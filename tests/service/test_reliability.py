"""A real server under clients that go away, and under ten times what it can draw: nothing is lost, nothing grows."""

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.answers import picture
from tests.service.conftest import TinyBase
from tests.service.served import Served, served

DRAW = "/v1/images/generations"
AT_ONCE = 24
"""Clients at a time."""
GROWTH = 32.0
"""MiB that the server may grow by once it is warm: allocators keep some."""
LIMITS = {"queue_seconds": 3, "request_timeout": 60}


@pytest.fixture(scope="module")
def server(tiny_base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tiny_base, tmp_path_factory.mktemp("served"), **LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def usual_server(tiny_base: TinyBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """With the backend that a user gets; on a CPU its first start takes a while."""
    with served(tiny_base, tmp_path_factory.mktemp("usual"), backend="auto", **LIMITS) as server:
        yield server


def kinds(base: str) -> list[dict[str, Any]]:
    """Requests that differ in all that decides which call of which network a picture waits for."""
    ways: list[dict[str, Any]] = [
        {"steps": 1},
        {"steps": 2, "n": 2},
        {"steps": 4},
        {"steps": 4, "n": 3},
        {"steps": 2, "guidance_scale": 3.0, "negative_prompt": "cat"},
        {"steps": 4, "diversity": True},
        {"steps": 4, "diversity": {"base_steps": 2, "base_guidance": 2.0}},
        {"steps": 3, "model": base},
        {"steps": 2, "model": base, "guidance_scale": 1.0},
    ]
    prompts = ["red apple", "blue dog", "a green cat of the sun"]
    return [
        {"prompt": prompts[index % 3], "seed": 100 * index, "deterministic": deterministic, **way}
        for index, way in enumerate(ways)
        for deterministic in (True, False)
    ]


def pixels(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(picture(item).convert("RGB")).astype(int)


def same(body: dict[str, Any], got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Bit for bit where that is promised; else each pixel, but for the rounding that another batch brings."""
    if body["deterministic"]:
        return [item["b64_json"] for item in got] == [item["b64_json"] for item in expected]
    return all(np.abs(pixels(one) - pixels(other)).max() <= 2 for one, other in zip(got, expected, strict=True))


@asynccontextmanager
async def client_of(server: Served) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=AT_ONCE)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:
        yield client


class Crowd:
    """Clients that ask for pictures, of which a third go away: in the line, in the drawing, or within a stream."""

    def __init__(self, client: httpx.AsyncClient, bodies: list[dict[str, Any]], seed: int) -> None:
        self.client = client
        self.bodies = bodies
        self.chance = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.expected: list[list[dict[str, Any]]] = []

    async def learn(self) -> None:
        """What each request draws when it is alone."""
        for body in self.bodies:
            response = await self.client.post(DRAW, json=body)
            assert response.status_code == 200, response.text
            self.expected.append(response.json()["data"])

    async def come(self, count: int) -> None:
        """So many clients, a limited number of them at a time."""
        room = asyncio.Semaphore(AT_ONCE)

        async def one(kind: int, leaves: bool, streams: bool, patience: float) -> None:
            async with room:
                await self._one(kind, leaves, streams, patience)

        chosen = [
            (self.chance.randrange(len(self.bodies)), number % 3 == 0, self.chance.random() < 0.4, self.chance.random())
            for number in range(count)
        ]
        await asyncio.gather(*(one(*each) for each in chosen))

    async def _one(self, kind: int, leaves: bool, streams: bool, patience: float) -> None:
        body = self.bodies[kind]
        try:
            # A client that leaves does so at any time of a drawing; a hundredth of the time is before it is even admitted.
            async with asyncio.timeout(0.5 * patience**2 if leaves else 120):
                got = await (self._streamed(body) if streams else self._drawn(body))
        except TimeoutError:
            self.seen["left" if leaves else "lost"] += 1
            return
        self.seen["drawn"] += 1
        if not same(body, got, self.expected[kind]):
            self.wrong.append(f"{body} (streamed: {streams})")

    async def _drawn(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        response = await self._until_admitted(lambda: self.client.post(DRAW, json=body))
        data: list[dict[str, Any]] = response.json()["data"]
        return data

    async def _streamed(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        asked = {**body, "stream": True, "partial_images": 2}
        response = await self._until_admitted(lambda: self.client.post(DRAW, json=asked))
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
        done = [httpx.Response(200, content=event).json() for event in events]
        completed = [event for event in done if event["type"] == "image_generation.completed"]
        return sorted(completed, key=lambda event: int(event["picture_index"]))

    async def _until_admitted(self, ask: Any) -> httpx.Response:
        while True:
            response: httpx.Response = await ask()
            if response.status_code != 429:
                assert response.status_code == 200, response.text
                return response
            self.seen["full"] += 1
            await asyncio.sleep(min(float(response.headers["retry-after"]), 1.0))


async def storm(server: Served, base: str, count: int, seed: int) -> tuple[Crowd, list[float]]:
    """The crowd in four parts; the server's memory behind each."""
    async with client_of(server) as client:
        crowd = Crowd(client, kinds(base), seed)
        await crowd.learn()
        memory = []
        for _ in range(4):
            await crowd.come(count // 4)
            memory.append(server.memory)
        await nothing_is_left(client)
        return crowd, memory


async def nothing_is_left(client: httpx.AsyncClient) -> None:
    """Those who have gone hold no place any more."""
    async with asyncio.timeout(30):
        while "fewstep_queue_pictures 0.0" not in (await client.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


def check(crowd: Crowd, memory: list[float], count: int) -> None:
    assert not crowd.wrong, f"{len(crowd.wrong)} wrong answers, such as {crowd.wrong[:3]}"
    assert crowd.seen["lost"] == 0
    assert crowd.seen["drawn"] + crowd.seen["left"] == count
    assert crowd.seen["left"] > count / 10, f"too few have left for this to tell anything: {crowd.seen}"
    assert max(memory[1:]) - memory[0] < GROWTH, f"MiB after each quarter: {memory}"


def test_clients_that_leave_take_nothing_from_those_who_stay(server: Served, tiny_base: TinyBase) -> None:
    check(*asyncio.run(storm(server, tiny_base.id, 120, seed=1)), count=120)


@pytest.mark.slow
def test_a_thousand_clients_of_whom_a_third_leave(usual_server: Served, tiny_base: TinyBase) -> None:
    check(*asyncio.run(storm(usual_server, tiny_base.id, 1000, seed=2)), count=1000)


class Flood:
    """Requests at a steady rate, however many of them are still being answered."""

    def __init__(self, client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        self.client = client
        self.body = body
        self.statuses: Counter[int] = Counter()
        self.slowest = 0.0
        """Seconds of the slowest answer that has pictures."""
        self.without_retry_after = 0

    async def capacity(self, count: int = 4) -> float:
        """Requests a second, one after another; each has enough pictures to fill the batches."""
        await self._one()
        started = time.perf_counter()
        for _ in range(count):
            await self._one()
        assert set(self.statuses) == {200}
        return count / (time.perf_counter() - started)

    async def pour(self, rate: float, seconds: float) -> None:
        """At exponential intervals of mean ``1 / rate``."""
        chance, end = random.Random(3), time.perf_counter() + seconds
        async with asyncio.TaskGroup() as group:
            due = time.perf_counter()
            while due < end:
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                group.create_task(self._one())
                due += chance.expovariate(rate)

    async def _one(self) -> None:
        started = time.perf_counter()
        response = await self.client.post(DRAW, json=self.body)
        self.statuses[response.status_code] += 1
        if response.status_code == 200:
            self.slowest = max(self.slowest, time.perf_counter() - started)
        elif not response.headers.get("retry-after", "").isdigit():
            self.without_retry_after += 1


async def overload(server: Served, base: str, seconds: float) -> tuple[Flood, list[float]]:
    """Ten times what it can draw; the server's memory ten times a second."""
    async with client_of(server) as client:
        flood = Flood(client, {"prompt": "red apple", "model": base, "steps": 20, "n": 8, "guidance_scale": 2.0})
        rate = 10 * await flood.capacity()
        memory = [server.memory]
        pouring = asyncio.create_task(flood.pour(rate, seconds))
        while not pouring.done():
            memory.append(server.memory)
            await asyncio.wait({pouring}, timeout=0.1)
        await pouring
        await nothing_is_left(client)
        assert (await client.post(DRAW, json={"prompt": "red apple"})).status_code == 200, "it draws again at once"
        return flood, memory


def check_overload(flood: Flood, memory: list[float]) -> None:
    assert set(flood.statuses) == {200, 429}, flood.statuses
    assert flood.statuses[429] > flood.statuses[200], f"that was no overload: {flood.statuses}"
    assert flood.without_retry_after == 0
    assert flood.slowest < 60, "what was admitted is answered within the limit that the server has been given"
    assert max(memory) - memory[0] < GROWTH, f"MiB: {memory[0]:.0f}, then up to {max(memory):.0f}"


def test_ten_times_too_much_is_refused_in_good_order(server: Served, tiny_base: TinyBase) -> None:
    check_overload(*asyncio.run(overload(server, tiny_base.id, 5)))


@pytest.mark.slow
def test_a_minute_of_ten_times_too_much(usual_server: Served, tiny_base: TinyBase) -> None:
    check_overload(*asyncio.run(overload(usual_server, tiny_base.id, 60)))
