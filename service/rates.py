"""Rate limits per client, as token buckets: requests and images per minute.

The counts belong to this process: behind a load balancer, each replica counts on its own.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.engine.base import EngineError

_SLACK = 1e-9
"""Tolerance in tokens for rounding errors, after a wait that was just long enough."""


class RateLimited(EngineError):
    """The client has exceeded its requests or images per minute.

    Attributes:
        retry_after: whole seconds until the same request will be accepted, at least 1.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Bucket:
    """A token bucket that holds one minute's tokens, so that an idle client may use a minute's worth at once.

    A single request may take more than the bucket holds: it waits for a full bucket and leaves a debt, so that it is
    neither impossible nor cheaper than the same amount in several requests.

    Args:
        per_minute: tokens added per minute, above 0.
        clock: monotonic time in seconds.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._level = per_minute
        self._at = clock()

    def take(self, tokens: float = 1) -> float:
        """Take tokens and return 0.0, or take none and return the seconds until it will be possible."""
        missing = min(tokens, self.per_minute) - self._filled()
        if missing > _SLACK:
            return self._seconds(missing)
        self._level -= tokens
        return 0.0

    def give(self, tokens: float) -> None:
        """Return tokens that were not used after all."""
        self._level = min(self.per_minute, self._filled() + tokens)

    @property
    def remaining(self) -> int:
        """Whole tokens that could be taken now."""
        return max(0, math.floor(self._filled() + _SLACK))

    @property
    def full_in(self) -> float:
        """Seconds until the bucket is full if nothing more is taken."""
        return self._seconds(self.per_minute - self._filled())

    def _filled(self) -> float:
        now = self._clock()
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def _seconds(self, tokens: float) -> float:
        return max(0.0, tokens) * 60 / self.per_minute


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one client; None is no limit."""

    requests_per_minute: int | None = None
    pictures_per_minute: int | None = None


class Rates:
    """The buckets of all clients. Used only on the event loop.

    Args:
        limits: returns a client's limits by its id; called every time, so that changes need no restart.
        clock: monotonic time in seconds.
    """

    def __init__(self, limits: Callable[[str], Limits], clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket] = {}

    def take_request(self, client: str) -> None:
        """Count one request. Raises RateLimited."""
        self._take(client, "requests", 1)

    def take_pictures(self, client: str, pictures: int) -> None:
        """Count images that are about to be generated. Raises RateLimited."""
        self._take(client, "images", pictures)

    def give_pictures(self, client: str, pictures: int) -> None:
        """Return images that were counted but refused."""
        bucket = self._bucket(client, "images")
        if bucket is not None:
            bucket.give(pictures)

    def headers(self, client: str) -> Iterator[tuple[str, str]]:
        """OpenAI's ``x-ratelimit-...`` headers for each of this client's limits."""
        for what in ("requests", "images"):
            bucket = self._bucket(client, what)
            if bucket is not None:
                yield f"x-ratelimit-limit-{what}", str(round(bucket.per_minute))
                yield f"x-ratelimit-remaining-{what}", str(bucket.remaining)
                yield f"x-ratelimit-reset-{what}", duration(bucket.full_in)

    def _take(self, client: str, what: str, tokens: int) -> None:
        bucket = self._bucket(client, what)
        seconds = bucket.take(tokens) if bucket is not None else 0.0
        if bucket is not None and seconds > 0:
            wait = max(1, math.ceil(seconds))
            message = f"rate limit: {bucket.per_minute:g} {what} per minute; try again in {wait} s"
            raise RateLimited(message, wait)

    def _bucket(self, client: str, what: str) -> Bucket | None:
        limits = self._limits(client)
        per_minute = limits.requests_per_minute if what == "requests" else limits.pictures_per_minute
        if per_minute is None:
            return None
        bucket = self._buckets.get((client, what))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[client, what] = Bucket(per_minute, self._clock)
        return bucket


def duration(seconds: float) -> str:
    """Format a duration as OpenAI's headers do: '0s', '250ms', '1.5s', '6m0s'; rounded up to milliseconds."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
