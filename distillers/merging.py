"""Merges the events of a job's parts into one stream, which the service reads for a job with several students."""

from collections.abc import Callable
from pathlib import Path

from distillers.events import Reporter, now
from weights.contracts import TrainSpec
from weights.events import AnyEvent, Failed, Finished, Progress, Saved, Started


class MergedEvents:
    """Turns the events of each part into events of the whole job.

    The job's step is the sum of its parts' steps, each counted up to ``iterations`` (which a finished part has reached,
    even if its time ran out earlier). Metrics and the paths of saved files are prefixed with ``part-K/``.

    Args:
        reporter: receives the job's events.
        parts: number of parts.
        train: each part's settings.
        parallel: whether the parts run at the same time.
        accepted: called when the first part begins to train, from its newest checkpoint if it has one.
    """

    def __init__(
        self,
        reporter: Reporter,
        parts: int,
        train: TrainSpec,
        *,
        parallel: bool,
        accepted: Callable[[], None] = lambda: None,
    ) -> None:
        self.reporter = reporter
        self.train = train
        self.parallel = parallel
        self.accepted = accepted
        self.steps = [0] * parts
        self.started: set[int] = set()
        self.failures: dict[int, str] = {}
        self.last_checkpoint: str | None = None
        self._said_so = False  # whether the job's start has been reported
        self._left: dict[int, float] = {}
        self._whole: float | None = None

    @property
    def step(self) -> int:
        """Sum over all parts."""
        return sum(self.steps)

    @property
    def iterations(self) -> int:
        """Sum over all parts."""
        return len(self.steps) * self.train.iterations

    def skip(self, part: int) -> None:
        """Counts a part as finished."""
        self.steps[part] = self.train.iterations
        self.started.add(part)
        self._left[part] = 0.0

    def take(self, part: int, event: AnyEvent) -> None:
        """Reports an event of a part."""
        match event:
            case Started():
                self._started(part, event)
            case Progress():
                self.steps[part] = event.step
                self._estimate(part, event)
                self._progress({f"part-{part}/{name}": value for name, value in event.metrics.items()})
            case Saved():
                path = f"part-{part}/{event.path}"
                if event.kind == "checkpoint":
                    self.last_checkpoint = path
                self.steps[part] = event.step
                self.reporter.emit(event.model_copy(update={"step": self.step, "path": path}))
            case Finished():
                self.skip(part)
                self._progress({f"part-{part}/seconds": event.seconds})
            case Failed():
                self.failures[part] = event.message

    def _started(self, part: int, event: Started) -> None:
        self.steps[part] = event.resumed_from
        self.started.add(part)
        if not self._said_so:
            self._said_so = True
            self.accepted()
            step = self.step
            self.reporter.emit(Started(at=now(), step=step, iterations=self.iterations, resumed_from=step))

    def _estimate(self, part: int, event: Progress) -> None:
        if event.seconds_left is None:
            return
        self._left[part] = event.seconds_left
        if event.step < event.iterations:
            whole = event.seconds_left * event.iterations / (event.iterations - event.step)
            limit = self.train.max_minutes
            self._whole = whole if limit is None else min(whole, 60 * limit)

    @property
    def seconds_left(self) -> float | None:
        """Of parallel parts, the longest; else the rest of the current part, and a whole one for each not yet begun."""
        if not self._left:
            return None
        if self.parallel:
            return max(self._left.values())
        waiting = len(self.steps) - len(self.started)
        if waiting and self._whole is None:
            return None
        return sum(self._left.values()) + waiting * (self._whole or 0.0)

    def _progress(self, metrics: dict[str, float]) -> None:
        self.reporter.emit(
            Progress(
                at=now(), step=self.step, iterations=self.iterations, metrics=metrics, seconds_left=self.seconds_left
            )
        )


class PartReporter(Reporter):
    """Reporter of a part that runs in the job's own process: writes to the part's file, and to the merged stream.

    Args:
        folder: the part's.
        merged: merged events of the job.
        part: its number.
    """

    def __init__(self, folder: Path, merged: MergedEvents, part: int) -> None:
        super().__init__(folder, main=merged.reporter.main)
        self.on_terminal = False  # the progress bar belongs to the job
        self._merged, self._part = merged, part

    def emit(self, event: AnyEvent) -> None:
        """See `Reporter.emit`."""
        if self.main:
            self.append(event)
        self._merged.take(self._part, event)

    def tick(self, what: str, done: int, total: int, note: str = "") -> None:
        """See `Reporter.tick`."""
        self._merged.reporter.tick(what, done, total, note)
