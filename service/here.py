"""An engine of this process, for commands that draw without a server."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.engine.base import Engine, ModelBroken
from service.engine.observer import Observer
from service.engine.step_engine import StepEngine
from service.settings import Settings

T = TypeVar("T")


def make_engine(settings: Settings, observer: Observer | None = None) -> Engine:
    """The engine that these settings name.

    Args:
        settings: the server's.
        observer: told of every call and of every request's end.

    Raises:
        BadSettings: it cannot be made of them.
    """
    return StepEngine.from_settings(settings, observer)


def draw_here(settings: Settings, work: Callable[[Engine], Awaitable[T]]) -> T:
    """The work's result, done with an engine that is started for it and stopped behind it.

    Raises:
        BadSettings: an engine cannot be made of these settings.
        EngineError: it refused the work, failed at it, or did not start.
    """

    async def whole() -> T:
        engine = make_engine(settings)
        await engine.start()
        try:
            while not engine.ready and engine.failure is None:  # noqa: ASYNC110 - the engine tells nobody
                await asyncio.sleep(0.05)
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(whole())


def reason(error: Exception) -> str:
    """What a person at this terminal is told: where the engine tells clients of a log, that is here."""
    return f"{error.__cause__}" if isinstance(error, ModelBroken) and error.__cause__ is not None else str(error)
