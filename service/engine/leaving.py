"""The process's end, while threads are at work that nobody waits for any longer.

Code of torch or OpenVINO cannot be interrupted, and a thread that is still in it when Python goes away takes the process
down with SIGABRT. So Python's own end waits for those threads. A server that has answered everybody need not: it ends
without that.
"""

import atexit
import logging
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable

log = logging.getLogger(__name__)

_leaving = threading.Event()
"""Set where the process ends without Python's own end: then nobody waits."""


def wait_at_the_end(thread: threading.Thread) -> None:
    """Have Python's own end wait for this thread."""
    atexit.register(_wait_for, thread)


def leave() -> None:
    """End the process at once, with status 0, if any other thread is left; what is registered for the end is done first.

    For a process whose work is done: what the threads are at is lost, as if the process had been killed.
    """
    if threading.active_count() > 1:
        _leaving.set()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Beside:
    """A thread that does one thing after another, for as long as somebody holds this.

    At Python's own end it finishes what it is at, and begins nothing more.

    Args:
        name: the thread's.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_work_off, args=(self._work,), name=name, daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._work, thread)  # at the process's end too

    def put(self, work: Callable[[], object]) -> None:
        """Do this behind all that was put before."""
        self._work.put(work)


def _work_off(work: "queue.SimpleQueue[Callable[[], object] | None]") -> None:
    while (each := work.get()) is not None:
        try:
            each()
        except Exception:
            log.exception("what was done on the thread %r failed", threading.current_thread().name)
        del each  # or an idle thread would hold what it belongs to


def _end(work: "queue.SimpleQueue[Callable[[], object] | None]", thread: threading.Thread) -> None:
    while not work.empty():
        work.get()
    work.put(None)
    _wait_for(thread)


def _wait_for(thread: threading.Thread) -> None:
    if not _leaving.is_set() and thread is not threading.current_thread():
        thread.join()
