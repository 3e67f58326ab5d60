"""Keeps model calls apart from loads that change process-wide torch state."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """A lock that lets computations pass one at a time, and none while it is closed.

    A thread that wants to close it gets the next turn: one that makes call after call cannot keep it open for ever.
    """

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._inside = threading.Lock()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Run the block once the gate is open."""
        with self._turn:
            self._inside.acquire()
        try:
            yield
        finally:
            self._inside.release()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Run the block while nothing can pass."""
        with self._turn, self._inside:
            yield
