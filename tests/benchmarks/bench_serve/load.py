"""The load: clients that wait for each answer before they ask again, and clients that ask when they want to."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection

import httpx

from tests.benchmarks.bench_serve.traffic import Ask, percentile

DRAW = "/v1/images/generations"
PATIENCE = 600.0
"""Seconds for one answer; a benchmark that takes longer is of another kind."""


class Failed(RuntimeError):
    """A server answered with something else than pictures: there is nothing to compare."""


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """What a server does when there is always more to do."""

    images_per_second: float
    requests_per_second: float


@dataclass(kw_only=True)
class Latencies:
    """Seconds from the time at which a request was due until its answer was there."""

    seconds: list[float] = field(default_factory=list)
    refused: int = 0
    """Requests that were answered 429."""

    def at(self, share: float) -> float:
        """A percentile; infinite where as many were refused, which is worse than any wait."""
        return percentile([*self.seconds, *[float("inf")] * self.refused], share)


@contextmanager
def connection_to(url: str) -> Iterator[HTTPConnection]:
    """One connection of Python's plainest client, kept open: what is timed alone is the server, not a client's own work."""
    host, _, port = url.removeprefix("http://").partition(":")
    connection = HTTPConnection(host, int(port), timeout=PATIENCE)
    try:
        yield connection
    finally:
        connection.close()


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Connections as many as are wanted, kept open."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE, limits=limits, trust_env=False) as client:
        yield client


async def ask(client: httpx.AsyncClient, model: str, one: Ask) -> bool:
    """Whether the request was answered with its pictures; False where the server has no room.

    Raises:
        Failed: anything else.
    """
    response = await client.post(DRAW, json=one.body(model))
    if response.status_code == 429:
        return False
    if response.status_code != 200 or response.content.count(b'"b64_json"') != one.n:
        raise Failed(f"{client.base_url} answered {response.status_code} to {one}: {response.text[:300]}")
    return True


async def saturate(
    url: str, model: str, asks: Iterator[Ask], clients: int, seconds: float, settle: float
) -> Saturation:
    """A closed loop: each client asks anew as soon as it has its answer.

    Args:
        url: the server.
        model: the model to ask for.
        asks: endless.
        clients: how many.
        seconds: what is measured; answers that come later are waited for, and not counted.
        settle: seconds before that, in which nothing is counted.
    """
    start = time.perf_counter() + settle
    end = start + seconds
    images = requests = 0

    async def one_client(client: httpx.AsyncClient) -> None:
        nonlocal images, requests
        while time.perf_counter() < end:
            one = next(asks)
            if not await ask(client, model, one):
                await asyncio.sleep(0.1)
            elif start <= time.perf_counter() < end:
                images += one.n
                requests += 1

    async with client_of(url) as client, asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(one_client(client))
    return Saturation(images_per_second=images / seconds, requests_per_second=requests / seconds)


async def arrive(url: str, model: str, schedule: Sequence[tuple[float, Ask]]) -> Latencies:
    """An open loop: each request is sent when it is due, whatever has been answered until then.

    The wait counts from the time it was due, so that a late load generator makes a server look slower, never faster.
    """
    found = Latencies()
    start = time.perf_counter()

    async def one_request(client: httpx.AsyncClient, due: float, one: Ask) -> None:
        if await ask(client, model, one):
            found.seconds.append(time.perf_counter() - start - due)
        else:
            found.refused += 1

    async with client_of(url) as client, asyncio.TaskGroup() as group:
        for due, one in schedule:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            group.create_task(one_request(client, due, one))
    return found


def one_by_one(connection: HTTPConnection, model: str, one: Ask) -> float:
    """Seconds of one request while there is no other: until the whole answer is read."""
    started = time.perf_counter()
    status, content = _answered(connection, "POST", DRAW, json.dumps(one.body(model)))
    seconds = time.perf_counter() - started
    if status != 200 or content.count(b'"b64_json"') != one.n:
        raise Failed(f"{connection.host}:{connection.port} answered {status} to {one}: {content[:300]!r}")
    return seconds


def nothing(connection: HTTPConnection) -> float:
    """Seconds of an answer for which nothing is drawn: what HTTP takes by itself."""
    started = time.perf_counter()
    status, _ = _answered(connection, "GET", "/health/live", None)
    seconds = time.perf_counter() - started
    if status != 200:
        raise Failed(f"{connection.host}:{connection.port} answered {status} to whether it lives")
    return seconds


def _answered(connection: HTTPConnection, method: str, path: str, body: str | None) -> tuple[int, bytes]:
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read()
