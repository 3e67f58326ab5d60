"""The events of a job's parts as one stream: what the service reads of a job with several students."""

from pathlib import Path

from distillers.events import Reporter, now
from weights.contracts import AnyEvent, Failed, Finished, Progress, Saved, Started, TrainSpec


class MergedEvents:
    """Turns each part's events into the whole job's.

    The job's step is the sum of the parts' steps, each of which counts to ``iterations`` (and has got there when it is
    finished, though its time was up before). Metrics are named ``part-K/...``, and so are the paths of what is saved.

    Args:
        reporter: takes the whole job's events.
        parts: how many there are.
        train: each part's settings.
        parallel: whether the parts run at the same time.
    """

    def __init__(self, reporter: Reporter, parts: int, train: TrainSpec, *, parallel: bool) -> None:
        self.reporter = reporter
        self.train = train
        self.parallel = parallel
        self.steps = [0] * parts
        self.started: set[int] = set()
        self.failures: dict[int, str] = {}
        self.last_checkpoint: str | None = None
        self._said_so = False  # that the job has started
        self._left: dict[int, float] = {}
        self._whole: float | None = None

    @property
    def step(self) -> int:
        """Of all parts together."""
        return sum(self.steps)

    @property
    def iterations(self) -> int:
        """Of all parts together."""
        return len(self.steps) * self.train.iterations

    def skip(self, part: int) -> None:
        """This part was done before."""
        self.steps[part] = self.train.iterations
        self.started.add(part)
        self._left[part] = 0.0

    def take(self, part: int, event: AnyEvent) -> None:
        """Reports what a part has reported."""
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
        """Of parallel parts the longest; else what is left of this one, and as much again for each that has not begun."""
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
    """Reports of a part that runs in the whole job's process: to the part's own file, and merged into the job's stream.

    Args:
        folder: the part's.
        merged: of the whole job.
        part: its number.
    """

    def __init__(self, folder: Path, merged: MergedEvents, part: int) -> None:
        super().__init__(folder, main=merged.reporter.main)
        self.on_terminal = False  # the bar is the job's
        self._merged, self._part = merged, part

    def emit(self, event: AnyEvent) -> None:
        """See `Reporter.emit`."""
        if self.main:
            self.append(event)
        self._merged.take(self._part, event)

    def tick(self, what: str, done: int, total: int, note: str = "") -> None:
        """See `Reporter.tick`."""
        self._merged.reporter.tick(what, done, total, note)
