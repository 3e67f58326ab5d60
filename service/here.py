"""An engine in this process, for commands that generate images without a server."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from service.engine.base import Engine, ModelBroken
from service.engine.observer import Observer
from service.engine.step_engine import StepEngine
from service.settings import Settings

T = TypeVar("T")


def make_engine(settings: Settings, observer: Observer | None = None) -> Engine:
    """Create the engine that the settings describe.

    Args:
        settings: settings of the server.
        observer: notified of every call and of every request's end.

    Raises:
        BadSettings: they cannot be used.
    """
    return StepEngine.from_settings(settings, observer)


def draw_here(settings: Settings, work: Callable[[Engine], Awaitable[T]]) -> T:
    """Start an engine, run ``work`` with it, stop it, and return the result.

    Raises:
        BadSettings: an engine cannot be created from these settings.
        EngineError: the engine refused the work, failed at it, or did not start.
    """

    async def whole() -> T:
        engine = make_engine(settings)
        await engine.start()
        try:
            while not engine.ready and engine.failure is None:  # noqa: ASYNC110 - the engine has no event to wait for
                await asyncio.sleep(0.05)
            return await work(engine)
        finally:
            await engine.stop()

    return asyncio.run(whole())


def reason(error: Exception) -> str:
    """An error's message for a terminal: where the engine refers clients to a log, this gives the cause instead."""
    return f"{error.__cause__}" if isinstance(error, ModelBroken) and error.__cause__ is not None else str(error)
