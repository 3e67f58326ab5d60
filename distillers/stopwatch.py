"""Time that adds up: by the clock, and the processor's, which other work on the machine takes nothing from."""

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass
class Stopwatch:
    """Runs inside a ``with`` block, and goes on in the next one."""

    seconds: float = 0.0
    """By the clock."""
    processor_seconds: float = 0.0
    """Of the processor, in all threads of this process."""

    def __enter__(self) -> Self:
        self._since = time.monotonic(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.monotonic() - self._since[0]
        self.processor_seconds += time.process_time() - self._since[1]
