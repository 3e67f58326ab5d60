"""A cache of what the store says about students, so that a request for one in use does not wait for the disk.

A disk takes part of a millisecond to say that nothing has changed, and a network disk may not respond at all. So the
event loop and the engine's thread use the last known answer, however old, and a thread of its own refreshes it.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from weights.store import Store, StoreError, StudentFolder, Unreadable

log = logging.getLogger(__name__)

FRESH_SECONDS = 0.5
"""Maximum age of an answer while the refreshing thread is not running.

While it runs and the store responds, a republished student takes the old one's place within this time.
"""
AGAIN_SECONDS = 0.1
"""Seconds between two refreshes."""
IN_USE_SECONDS = 60.0
"""Seconds after which a student that is not asked for is forgotten."""


class Unseen(LookupError):
    """Nothing is known about a student without asking the store."""


@dataclass(kw_only=True)
class _Seen:
    folder: StudentFolder
    at: float
    """When the look-up began."""
    used: float


class Recent:
    """The students asked for recently. Thread-safe.

    Known answers are as current as the refreshing thread can keep them: while it waits for the disk, nobody else asks
    the store about students in use. Before the thread starts and after it stops, answers that are no longer fresh come
    from the store.

    Args:
        store: the students.
        clock: monotonic time in seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()
        self._some = threading.Event()
        """Set while any student is in use."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="recent students", daemon=True)

    def start(self) -> None:
        """Start refreshing."""
        self._thread.start()

    def stop(self) -> None:
        """Stop refreshing, without waiting for the disk."""
        self._over.set()
        self._some.set()

    def find(self, name: str) -> StudentFolder:
        """Like `Store.find`, but from memory if the student is known (see `knows`).

        Raises:
            StoreError: see `Store.find`, which is called otherwise.
        """
        try:
            return self.last(name)
        except Unseen:
            return self._look(name, used=self._clock())

    def last(self, name: str) -> StudentFolder:
        """Like `find`, but from memory only.

        Raises:
            Unseen: nothing is known that may be used.
        """
        now = self._clock()
        seen = self._known(name, now)
        if seen is None:
            raise Unseen(name)
        seen.used = now
        return seen.folder

    def knows(self, name: str) -> bool:
        """Whether `find` would answer from memory."""
        return self._known(name, self._clock()) is not None

    def open(self, name: str) -> StudentFolder:
        """Call `Store.open`, and remember its answer.

        Raises:
            StoreError: see `Store.open`.
        """
        at = self._clock()
        folder = self._store.open(name)
        self._remember(name, folder, at, used=at)
        return folder

    def look_again(self) -> None:
        """Refresh all students in use; forget those that have not been asked for in a while, or no longer exist.

        What the disk fails to tell now stays as it was last known.
        """
        now = self._clock()
        for name, seen in list(self._seen.items()):
            if now - seen.used > IN_USE_SECONDS:
                self._forget(name)
                continue
            try:
                self._look(name, used=seen.used)
            except (Unreadable, OSError) as error:  # a disk that fails says nothing about the student
                log.debug("student %r could not be checked: %s", name, error)
            except StoreError:
                self._forget(name)  # whoever asks next gets the error

    def _known(self, name: str, now: float) -> _Seen | None:
        seen = self._seen.get(name)
        if seen is None or self._thread.is_alive() or now - seen.at <= FRESH_SECONDS:
            return seen
        return None

    def _look(self, name: str, used: float) -> StudentFolder:
        at = self._clock()
        folder = self._store.find(name)
        self._remember(name, folder, at, used)
        return folder

    def _remember(self, name: str, folder: StudentFolder, at: float, used: float) -> None:
        with self._lock:
            before = self._seen.get(name)
            if before is None or before.at <= at:  # an older look-up that took long must not hide a newer one
                used = used if before is None else max(used, before.used)
                self._seen[name] = _Seen(folder=folder, at=at, used=used)
            self._some.set()

    def _forget(self, name: str) -> None:
        with self._lock:
            self._seen.pop(name, None)
            if not self._seen and not self._over.is_set():
                self._some.clear()

    def _work(self) -> None:
        while True:
            self._some.wait()
            if self._over.wait(AGAIN_SECONDS):
                return
            try:
                self.look_again()
            except Exception:
                log.exception("the students in use could not be checked; trying again")
