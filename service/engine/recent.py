"""What the store says of students, remembered: so that a request for one that is in use does not wait for the disk.

A disk takes part of a millisecond to say that nothing has changed, and one that is reached over a network may not answer at
all. So the event loop and the engine's thread read what was seen last, however old, and a thread of its own looks again.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from weights.store import Store, StoreError, StudentFolder

log = logging.getLogger(__name__)

FRESH_SECONDS = 0.5
"""How old an answer may be where nobody looks again. Where somebody does, and the store answers, a student that is published
anew takes its place within this time."""
AGAIN_SECONDS = 0.1
"""Between two looks at what is in use."""
IN_USE_SECONDS = 60.0
"""After which a student that nobody asks for is forgotten."""


class Unseen(LookupError):
    """Nothing is known of a student without asking the store."""


@dataclass(kw_only=True)
class _Seen:
    folder: StudentFolder
    at: float
    """When the look began."""
    used: float


class Recent:
    """The students asked for lately. Any thread may ask.

    What is known is as good as the thread that looks again can make it: while that waits for the disk, nobody else asks it
    about what is in use. Before it has begun, and after it has ended, what is no longer fresh comes from the store itself.

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
        """As `Store.find`, from memory if it `knows`.

        Raises:
            StoreError: as `Store.find`, which is asked otherwise.
        """
        try:
            return self.last(name)
        except Unseen:
            return self._look(name, used=self._clock())

    def last(self, name: str) -> StudentFolder:
        """As `find`, from memory alone.

        Raises:
            Unseen: nothing is known of it that may be used.
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
        """As `Store.open`, and what it says is remembered.

        Raises:
            StoreError: as `Store.open`.
        """
        at = self._clock()
        folder = self._store.open(name)
        self._remember(name, folder, at, used=at)
        return folder

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
            if before is None or before.at <= at:  # a look that took long must not hide a later one
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
                log.exception("the students in use could not be looked at; they are looked at again")
