"""Reads the events file that a running job appends to, one JSON object per line.

Line numbers serve as event numbers. A line that is not a valid event (the job was killed while writing it) keeps its
number and is skipped; a last line without a newline is not read yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.jobs.base import JobEvent, Progress
from weights.events import EVENTS

EVENTS_FILE = "events.jsonl"


class EventReader:
    """Reads what has been appended to an events file since the last call, also when the job is resumed.

    Args:
        folder: the job's folder; the file need not exist yet.
        after: the number of lines to skip; they are counted, but not parsed.
    """

    def __init__(self, folder: Path, after: int = 0) -> None:
        self._path = folder / EVENTS_FILE
        self._after = after
        self._offset = 0
        self._number = 0

    def new(self) -> Iterator[JobEvent]:
        """Yield the events that have not been returned before."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                self._number += 1
                if self._number <= self._after:
                    continue
                try:
                    event = EVENTS.validate_json(line)
                except ValidationError:
                    continue
                yield JobEvent(number=self._number, event=event.model_dump(mode="json"))


def read_events(folder: Path, after: int, limit: int) -> tuple[list[JobEvent], bool]:
    """Up to ``limit`` events after line ``after``, oldest first; and whether there are more."""
    found: list[JobEvent] = []
    for event in EventReader(folder, after).new():
        if len(found) == limit:
            return found, True
        found.append(event)
    return found, False


@dataclass
class Account:
    """What a job has reported about itself in the events read so far."""

    attempt: int | None = None
    """The attempt that writes the events, where that matters."""
    progress: Progress | None = None
    finished: dict[str, Any] | None = None
    """The event that reports success."""
    failed: str | None = None
    """Why the job failed, in its own words."""

    def add(self, event: dict[str, Any]) -> None:
        """Record one more event."""
        match event["kind"]:
            case "started":
                self._reach(step=event["resumed_from"], iterations=event["iterations"])
            case "progress":
                self._reach(**{name: event[name] for name in ("step", "iterations", "metrics", "seconds_left")})
            case "checkpoint" if self.progress is not None:
                self.progress = replace(self.progress, checkpoint_attempt=self.attempt)
            case "finished":
                self.finished = event
                if self.progress is not None:  # progress is reported only every so many steps
                    self.progress = replace(self.progress, step=event["step"], seconds_left=0.0)
            case "failed":
                self.failed = event["message"]

    def _reach(self, **values: Any) -> None:
        saved_by = None if self.progress is None else self.progress.checkpoint_attempt
        self.progress = Progress(**values, checkpoint_attempt=saved_by)
