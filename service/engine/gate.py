"""Between the thread that draws and loads that change what all threads compute with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Open for whoever computes, one at a time, but while somebody has closed it.

    Whoever wants to close it comes next: a thread that makes call after call cannot keep it open for ever.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._inside = threading.Lock()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Compute, once the gate is open."""
        with self._turn:
            self._inside.acquire()
        try:
            yield
        finally:
            self._inside.release()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Nobody computes in here."""
        with self._turn, self._inside:
            yield
