"""What lies between routes and engine: refusal while draining, image rate limits, and the safety checker."""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from typing import Literal, cast

from PIL.Image import Image, new

from service.engine.aside import Aside
from service.engine.base import (
    BadRequest,
    Drawn,
    DrawRequest,
    Engine,
    Flagged,
    Load,
    ModelBroken,
    ModelInfo,
    NotReady,
    Overloaded,
    Preview,
    TimedOut,
    UnknownModel,
)
from service.rates import Rates
from service.safety import Checker

FlaggedAre = Literal["refused", "blanked"]

CHECKS = 4
"""Most images that are checked at the same time."""
UNDRAWN = (BadRequest, UnknownModel, Overloaded, NotReady, ModelBroken)
"""Refusals before anything is generated: these do not count against the client's image limit."""


class GuardedEngine:
    """Wraps an `Engine`. Every route generates images through it.

    Args:
        engine: generates images.
        rates: counts the images of each `DrawRequest.client`.
        checker: decides which images must not be shown; None shows all.
        flagged: what happens to these: the request is refused, or the image is replaced by a black one.
        seconds: limit of a request's time, including checks; a shorter limit in the request takes precedence.
    """

    def __init__(
        self,
        engine: Engine,
        rates: Rates,
        checker: Checker | None = None,
        flagged: FlaggedAre = "refused",
        seconds: float = math.inf,
    ) -> None:
        self._engine = engine
        self._rates = rates
        self._checker = checker
        self._flagged = flagged
        self._seconds = seconds
        self._aside = Aside(CHECKS)
        self._drains = False
        self._stopped = False
        self._checking = 0
        """Requests whose images are drawn, which the engine has forgotten, and not all checked."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def ready(self) -> bool:
        """See `Engine.ready`. False from the start of a drain."""
        return self._engine.ready and not self._drains

    @property
    def failure(self) -> str | None:
        """See `Engine.failure`."""
        return self._engine.failure

    async def start(self) -> None:
        """See `Engine.start`."""
        await self._engine.start()

    async def drain(self, seconds: float) -> None:
        """See `Engine.drain`. A request is finished once its images are checked."""
        self._drains = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._engine.drain(seconds)
                await self._idle.wait()

    async def stop(self) -> None:
        """See `Engine.stop`. Both the draining server and the app may call it; the second call has no effect."""
        if not self._stopped:
            self._stopped = True
            await self._engine.stop()

    def load(self) -> Load:
        """See `Engine.load`."""
        return self._engine.load()

    async def models(self) -> list[ModelInfo]:
        """See `Engine.models`."""
        return await self._engine.models()

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        """See `Engine.generate`.

        Raises:
            RateLimited: the client has used up its images for now.
            Flagged: the safety checker refused an image.
            TimedOut: also if the safety checker has not answered by the request's deadline.
        """
        hides = self._check_of(request)
        with self._admitted(request):
            drawn = await self._engine.generate(request)
        with self._checks():
            return [
                replace(item, image=_black(item.image), flagged=True) if await hides(item.image) else item
                for item in drawn
            ]

    async def stream(self, request: DrawRequest) -> AsyncIterator[Preview | Drawn]:
        """See `Engine.stream` and `generate`."""
        hides = self._check_of(request)
        with self._admitted(request):
            async with aclosing(cast(AsyncGenerator[Preview | Drawn], self._engine.stream(request))) as items:
                async for item in items:
                    if not await hides(item.image):
                        yield item
                    elif isinstance(item, Drawn):
                        yield replace(item, image=_black(item.image), flagged=True)
                    else:
                        yield replace(item, image=_black(item.image))

    @contextmanager
    def _admitted(self, request: DrawRequest) -> Iterator[None]:
        if self._drains:
            raise NotReady("the server is stopping; try again in a while")
        self._rates.take_pictures(request.client, len(request.seeds))
        try:
            yield
        except Flagged:
            raise
        except UNDRAWN:
            self._rates.give_pictures(request.client, len(request.seeds))
            raise

    @contextmanager
    def _checks(self) -> Iterator[None]:
        self._checking += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._checking -= 1
            if not self._checking:
                self._idle.set()

    def _check_of(self, request: DrawRequest) -> Callable[[Image], Awaitable[bool]]:
        """Return a function that tells whether an image of this request is to be replaced by a black one.

        The request's time starts now. The function raises Flagged, TimedOut, or EngineError if the checker fails.
        """
        clock = asyncio.get_running_loop().time
        limit = min(self._seconds, math.inf if request.seconds is None else request.seconds)
        deadline = clock() + limit
        checker = self._checker

        async def hides(image: Image) -> bool:
            if checker is None:
                return False
            try:
                flagged = await self._aside.within(deadline - clock(), checker.flags, image, request.prompt)
            except TimeoutError:
                message = f"the safety checker {checker.name!r} did not respond within the request's {limit:g} s"
                raise TimedOut(message) from None
            if flagged and self._flagged == "refused":
                raise Flagged(f"the safety checker {checker.name!r} flagged an image of this prompt", "prompt")
            return flagged

        return hides


def _black(image: Image) -> Image:
    return new("RGB", image.size)
