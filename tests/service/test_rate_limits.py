"""Rate limits: what a bucket promises whatever is asked of it, and what clients are told."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from service.app import create_app
from service.engine.base import BadRequest, EngineError, Overloaded
from service.keys import create_key
from service.rates import Bucket, Limits, RateLimited, Rates, duration
from service.settings import Settings
from tests.service.conftest import FakeEngine

DRAW = "/v1/images/generations"
EVENTS = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 12)), max_size=60)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(1, 600), EVENTS)
def test_never_more_than_a_bucket_and_its_flow(per_minute: int, events: list[tuple[float, int]]) -> None:
    """In any stretch of time: what flows in, a full bucket, and the debt of the one request that may outgrow it."""
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    granted: list[tuple[float, int]] = []
    for pause, tokens in events:
        clock.now += pause
        if bucket.take(tokens) == 0:
            granted.append((clock.now, tokens))
    for first in range(len(granted)):
        for last in range(first, len(granted)):
            window = granted[first : last + 1]
            flow = (window[-1][0] - window[0][0]) * per_minute / 60
            debt = max(0, max(tokens for _, tokens in window) - per_minute)
            assert sum(tokens for _, tokens in window) <= per_minute + flow + debt + 1e-6


@given(st.integers(1, 600), EVENTS, st.integers(1, 12))
def test_a_refusal_names_the_wait(per_minute: int, events: list[tuple[float, int]], tokens: int) -> None:
    """Whatever came before: after that wait the same request is let through, and half of it is too short."""
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    for pause, taken in events:
        clock.now += pause
        bucket.take(taken)
    wait = bucket.take(tokens)
    if wait == 0:
        return
    clock.now += wait / 2
    if wait > 1e-6:
        assert bucket.take(tokens) > 0
    clock.now += wait / 2 + 1e-6
    assert bucket.take(tokens) == 0


@given(st.integers(1, 600), EVENTS)
def test_what_is_left(per_minute: int, events: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    for pause, tokens in events:
        clock.now += pause
        bucket.take(tokens)
        assert 0 <= bucket.remaining <= per_minute
        if bucket.remaining:
            assert bucket.take(bucket.remaining) == 0
            assert bucket.remaining == 0
    clock.now += bucket.full_in + 1e-6
    assert (bucket.remaining, bucket.full_in) == (per_minute, pytest.approx(0, abs=1e-5))


def test_refused_tokens_come_back() -> None:
    bucket = Bucket(10, Clock())
    assert bucket.take(10) == 0
    bucket.give(10)
    assert bucket.remaining == 10
    bucket.give(5)
    assert bucket.remaining == 10


def test_a_request_larger_than_the_bucket_is_not_impossible() -> None:
    clock = Clock()
    bucket = Bucket(6, clock)
    assert bucket.take(10) == 0
    assert bucket.take(1) == pytest.approx(50)  # a debt of 4, and 1 more, at 6 a minute


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (0.0001, "1ms"), (0.25, "250ms"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"), (61.25, "1m1.25s")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


def test_clients_have_their_own_buckets() -> None:
    limits = {"a": Limits(requests_per_minute=1), "b": Limits(requests_per_minute=1), "c": Limits()}
    rates = Rates(limits.__getitem__, Clock())
    rates.take_request("a")
    with pytest.raises(RateLimited) as caught:
        rates.take_request("a")
    assert caught.value.retry_after == 60
    rates.take_request("b")
    for _ in range(100):
        rates.take_request("c")
        rates.take_pictures("c", 10)
    assert list(rates.headers("c")) == []
    limits["a"] = Limits(requests_per_minute=5)
    rates.take_request("a")


def limited(settings: Settings, engine: FakeEngine, **fields: Any) -> TestClient:
    return TestClient(create_app(settings.model_copy(update=fields), engine))


def test_requests_are_limited(settings: Settings, engine: FakeEngine) -> None:
    with limited(settings, engine, requests_per_minute=2) as client:
        answers = [client.get("/v1/models") for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0"]
        assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
        assert "x-ratelimit-limit-images" not in answers[0].headers
        error = answers[2].json()["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert "2 requests per minute" in error["message"]
        assert 1 <= int(answers[2].headers["retry-after"]) <= 30
        assert client.get("/health").status_code == 200
        assert "x-ratelimit-limit-requests" not in client.get("/health").headers


def test_pictures_are_limited(settings: Settings, engine: FakeEngine) -> None:
    with limited(settings, engine, pictures_per_minute=5) as client:
        first = client.post(DRAW, json={"prompt": "x", "n": 4})
        assert (first.status_code, first.headers["x-ratelimit-remaining-images"]) == (200, "1")
        refused = client.post(DRAW, json={"prompt": "x", "n": 2})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 12
        assert client.post(DRAW, json={"prompt": "x"}).status_code == 200
        assert len(engine.asked) == 2


@pytest.mark.parametrize(
    ("error", "left"), [(Overloaded("full", 1), "5"), (BadRequest("no", "steps"), "5"), (EngineError("broke"), "2")]
)
def test_only_what_may_have_been_drawn_counts(
    settings: Settings, engine: FakeEngine, error: Exception, left: str
) -> None:
    engine.error = error
    with limited(settings, engine, pictures_per_minute=5) as client:
        answer = client.post(DRAW, json={"prompt": "x", "n": 3})
    assert answer.status_code >= 400
    assert answer.headers["x-ratelimit-remaining-images"] == left


def test_a_key_has_its_own_limits(settings: Settings, engine: FakeEngine, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    own, _ = create_key(file, "own", ["generate"], requests_per_minute=100)
    usual, _ = create_key(file, "usual", ["generate"])
    with limited(settings, engine, keys_file=file, requests_per_minute=1) as client:

        def statuses(key: str) -> list[int]:
            headers = {"Authorization": f"Bearer {key}"}
            return [client.get("/v1/models", headers=headers).status_code for _ in range(3)]

        assert statuses(own) == [200] * 3
        assert statuses(usual) == [200, 429, 429]
