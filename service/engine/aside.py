"""Looks that may never end, at a disk that does not answer for instance: on threads of their own.

Nobody else uses these threads, as many do asyncio's, and nobody waits for them when the process ends.
"""

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Aside:
    """Runs functions beside the event loop.

    Args:
        threads: at most, at a time. One that hangs goes on being counted; whoever comes when all do waits.
    """

    def __init__(self, threads: int) -> None:
        self._free = asyncio.Semaphore(threads)

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What the function answers or raises. Who is cancelled does not wait for it, and it goes on."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        context = contextvars.copy_context()

        def tell(give: Callable[[Any], None], what: object) -> None:
            self._free.release()
            if not answer.done():  # nobody waits
                give(what)

        def work() -> None:
            try:
                done: tuple[Callable[[Any], None], object] = answer.set_result, context.run(call, *args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - whoever waits is told
                done = answer.set_exception, error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, *done)

        threading.Thread(target=work, name="aside", daemon=True).start()
        return await answer

    async def within(self, seconds: float, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """As `run`, for so many seconds, the wait for a thread included.

        Raises:
            TimeoutError: there is no answer. The function goes on.
        """
        async with asyncio.timeout(seconds):
            return await self.run(call, *args, **kwargs)
