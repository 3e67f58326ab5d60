"""What the store says of students, remembered: so that a request for one that is in use does not wait for the disk.

A disk takes part of a millisecond to say that nothing has changed, and one that is reached over a network may not answer at
all. So the event loop and the engine's thread read what was seen last, and a thread of its own looks again.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from weights.store import Store, StoreError, StudentFolder

log = logging.getLogger(__name__)

FRESH_SECONDS = 0.5
"""How old an answer may be: a student that is published anew takes its place within this time."""
AGAIN_SECONDS = 0.1
"""Between two looks at what is in use."""
IN_USE_SECONDS = 60.0
"""After which a student that nobody asks for is forgotten."""


@dataclass(kw_only=True)
class _Seen:
    folder: StudentFolder
    at: float
    """When the look began."""
    used: float


class Recent:
    """The students asked for lately. Any thread may ask.

    Nothing depends on the thread that looks again: without it, or while it waits for the disk, answers grow old, and the
    next one comes from the store itself.

    Args:
        store: the students.
        clock: seconds, rising.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._seen: dict[str, _Seen] = {}
        self._lock = threading.Lock()
        self._some = threading.Event()
        """Whether anything is in use."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="recent students", daemon=True)

    def start(self) -> None:
        """Begin to look again."""
        self._thread.start()

    def stop(self) -> None:
        """End, and do not wait for the disk."""
        self._over.set()
        self._some.set()

    def find(self, name: str) -> StudentFolder:
        """As `Store.find`, at most `FRESH_SECONDS` old.

        Raises:
            StoreError: as `Store.find`, which is asked where nothing fresh is known.
        """
        now = self._clock()
        seen = self._fresh(name, now)
        if seen is not None:
            seen.used = now
            return seen.folder
        return self._look(name, used=now)

    def knows(self, name: str) -> bool:
        """Whether `find` would answer from memory."""
        return self._fresh(name, self._clock()) is not None

    def look_again(self) -> None:
        """At everything in use; what nobody has asked for in a while, or what is there no more, is forgotten."""
        now = self._clock()
        for name, seen in list(self._seen.items()):
            if now - seen.used > IN_USE_SECONDS:
                self._forget(name)
                continue
            try:
                self._look(name, used=seen.used)
            except (StoreError, OSError):
                self._forget(name)  # whoever asks next is told why

    def _fresh(self, name: str, now: float) -> _Seen | None:
        seen = self._seen.get(name)
        return seen if seen is not None and now - seen.at <= FRESH_SECONDS else None

    def _look(self, name: str, used: float) -> StudentFolder:
        at = self._clock()
        folder = self._store.find(name)
        with self._lock:
            before = self._seen.get(name)
            if before is None or before.at <= at:  # a look that took long must not hide a later one
                used = used if before is None else max(used, before.used)
                self._seen[name] = _Seen(folder=folder, at=at, used=used)
            self._some.set()
        return folder

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
                log.exception("the students in use could not be looked at; they are looked at again")
