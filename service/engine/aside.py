"""Running functions that may never return, such as reads from an unresponsive disk, on threads of their own.

Unlike asyncio's default executor, these threads are not shared, and the process does not wait for them when it exits.
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
        threads: most calls at a time. One that hangs keeps its slot; if all of them hang, later callers wait.
    """

    def __init__(self, threads: int) -> None:
        self._free = asyncio.Semaphore(threads)

    async def run(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what the function returns, or raise what it raises. Cancelling this leaves the function running."""
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        context = contextvars.copy_context()

        def tell(give: Callable[[Any], None], what: object) -> None:
            self._free.release()
            if not answer.done():  # the caller has gone
                give(what)

        def work() -> None:
            try:
                done: tuple[Callable[[Any], None], object] = answer.set_result, context.run(call, *args, **kwargs)
            except BaseException as error:  # noqa: BLE001 - passed on to the caller
                done = answer.set_exception, error
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(tell, *done)

        threading.Thread(target=work, name="aside", daemon=True).start()
        return await answer

    async def within(self, seconds: float, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Like `run`, with a timeout that includes the wait for a free thread.

        Raises:
            TimeoutError: there was no answer in time. The function keeps running.
        """
        async with asyncio.timeout(seconds):
            return await self.run(call, *args, **kwargs)
