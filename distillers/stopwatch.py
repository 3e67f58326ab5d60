"""A stopwatch for wall-clock time and for processor time, which other load on the machine does not affect."""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass
class Stopwatch:
    """Runs inside a ``with`` block, and accumulates over several."""

    seconds: float = 0.0
    """Wall-clock time."""
    processor_seconds: float = 0.0
    """Processor time of all threads of this process."""

    def __enter__(self) -> Self:
        self._since = time.monotonic(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.monotonic() - self._since[0]
        self.processor_seconds += time.process_time() - self._since[1]
