"""Ending the process while threads are still busy with work that nobody waits for.

Code inside torch or OpenVINO cannot be interrupted, and a thread that is still in it when the interpreter shuts down
makes the process abort (SIGABRT). Interpreter shutdown therefore waits for such threads. A server that has answered
every request need not wait: it exits without an interpreter shutdown.
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
"""Set when the process exits without an interpreter shutdown, in which case nothing is waited for."""


def wait_at_the_end(thread: threading.Thread) -> None:
    """Make interpreter shutdown wait for this thread."""
    atexit.register(_wait_for, thread)


def leave() -> None:
    """Exit at once with status 0 if any other thread is left; exit handlers run first.

    For a process whose work is finished: whatever the threads are doing is lost, as if the process had been killed.
    """
    if threading.active_count() > 1:
        _leaving.set()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class Beside:
    """A thread that runs one task after another, for as long as this object is referenced.

    At interpreter shutdown it finishes the current task and starts no other.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        thread = threading.Thread(target=_work_off, args=(self._work,), name=name, daemon=True)
        thread.start()
        weakref.finalize(self, _end, self._work, thread)  # also at interpreter shutdown

    def put(self, work: Callable[[], object]) -> None:
        """Run this after everything queued before."""
        self._work.put(work)


def _work_off(work: "queue.SimpleQueue[Callable[[], object] | None]") -> None:
    while (each := work.get()) is not None:
        try:
            each()
        except Exception:
            log.exception("work on the thread %r failed", threading.current_thread().name)
        del each  # otherwise the idle thread would keep the task's owner in memory


def _end(work: "queue.SimpleQueue[Callable[[], object] | None]", thread: threading.Thread) -> None:
    while not work.empty():
        work.get()
    work.put(None)
    _wait_for(thread)


def _wait_for(thread: threading.Thread) -> None:
    if not _leaving.is_set() and thread is not threading.current_thread():
        thread.join()
