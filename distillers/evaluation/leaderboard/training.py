"""Trains one entry within its budget: a probe measures the cost of an iteration, then a process runs as many as fit.

The budget is in minutes, but learning rates fall by iterations, not by time, so the number of iterations is fixed
before training starts. For this, a throw-away run of the same job with the same number of threads is timed for a while.
The cost of the actual training is measured again. If it missed the budget by more than a tenth, as methods with phases
may, it is repeated once, with the number of iterations that its own cost allows. On a CPU, minutes are processor time
divided by the number of threads, so that other load on the machine costs a method nothing. With a GPU, they are
wall-clock time.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from distillers.evaluation.leaderboard.entries import Entry
from distillers.evaluation.leaderboard.records import OFF, Probe, Settings, Training, read
from distillers.evaluation.watch import Watched, watched
from weights.events import EVENTS, AnyEvent, Failed, Finished

COST = "cost.json"
"""File for the result of a probe; the probe's own spec is probe.json."""
ENDLESS = 10**6
"""Iterations of a probe, which is stopped by time."""
CHECKPOINT_SECONDS = 60


class TrainingFailed(RuntimeError):
    """The job failed and cannot be trained; the message is the job's own."""


class Stale(RuntimeError):
    """The folder's files come from another version of the recipe."""


class Busy(RuntimeError):
    """Another process is working in the folder."""


class Trainee:
    """The training of one entry, in its folder of the board."""

    def __init__(self, entry: Entry, folder: Path, settings: Settings, work: Path, probe_seconds: float) -> None:
        """
        Args:
            entry: the recipe.
            folder: the entry's own; an interrupted training is resumed from it.
            settings: the board's.
            work: the board's folder, with a cache of encoded data and a store shared by all entries.
            probe_seconds: training time of the probe.
        """
        self.entry, self.folder, self.settings, self.work = entry, folder, settings, work
        self.probe_seconds = probe_seconds

    def train(self, descriptor: int) -> Training:
        """Trains the entry, unless it has been trained; returns what that took.

        Args:
            descriptor: of the folder's lock (`locked`), inherited by the processes that train.

        Raises:
            TrainingFailed: the job failed.
            ChildProcessError: its process was ended by something else; another call resumes from its last checkpoint.
            Stale: the recipe has changed since its training began.
        """
        known = read(Training, self.folder / "training.json")
        probe = self.probe()
        if known is not None:
            return known
        if probe is None:
            probe = self._measure(descriptor)
        made = self._trained(probe, descriptor)
        if not probe.corrected and abs(made.seconds / 60 / self.settings.minutes - 1) > OFF:
            made = self._trained(self._corrected(probe, made), descriptor)
        made.write(self.folder / "training.json")
        for folder in list((self.folder / "job").rglob("checkpoints")):  # no longer needed, and large
            shutil.rmtree(folder)
        return made

    def _trained(self, probe: Probe, descriptor: int) -> Training:
        """Runs the job, or the rest of it."""
        every = max(1, round(CHECKPOINT_SECONDS / max(probe.seconds_per_iteration, 1e-3)))
        done = self._run("job", self._job(probe.iterations, None, every), descriptor)
        attempts = [Watched(**json.loads(line)) for line in self._attempts.read_text().splitlines()]
        return Training(
            iterations=done.metrics["iterations"],
            # Preparation done in an earlier attempt costs the last one nothing; the probe did all of it at once.
            seconds=self._spent(done, "") + max(probe.preparation_seconds, self._spent(done, "preparation_")),
            clock_seconds=done.metrics["training_seconds"] + done.metrics["preparation_seconds"],
            pictures=self.entry.job.train.batch_size * self.entry.job.train.gradient_accumulation,
            peak_bytes=max(attempt.peak_bytes for attempt in attempts),
            attempts=len(attempts),
        )

    def _corrected(self, probe: Probe, made: Training) -> Probe:
        """A new plan from the cost of the whole training, which for methods with phases differs from that at the start.

        The training that missed the budget is discarded, and its student replaced.
        """
        cost = (made.seconds - probe.preparation_seconds) / made.iterations
        shutil.rmtree(self.folder / "job")
        self._attempts.unlink()
        return self._plan(cost, probe.preparation_seconds, corrected=True)

    def probe(self) -> Probe | None:
        """The result of the probe, if there is one.

        Raises:
            Stale: it belongs to another version of the recipe.
        """
        known = read(Probe, self.folder / COST)
        if known is not None and known.recipe_sha256 != self.entry.sha256:
            raise Stale(f"the recipe of {self.entry.name} has changed since: delete {self.folder} to train it again")
        return known

    @property
    def _attempts(self) -> Path:
        return self.folder / "attempts.jsonl"

    def _job(self, iterations: int, minutes: float | None, every: int) -> dict[str, Any]:
        settings = self.settings
        spec = self.entry.spec(
            iterations=iterations, threads=settings.threads, seed=settings.seed, minutes=minutes, every=every
        )
        return {**spec, "train": {**spec["train"], "keep_checkpoints": 1}}

    def _measure(self, descriptor: int) -> Probe:
        """Times the start of the job in a throw-away folder."""
        folder = self.folder / "probe"
        shutil.rmtree(folder, ignore_errors=True)
        spec = self._job(ENDLESS, self.probe_seconds / 60, ENDLESS)
        done = self._run("probe", spec, descriptor, store=folder / "store")
        found = self._plan(self._spent(done, "") / done.step, self._spent(done, "preparation_"), corrected=False)
        shutil.rmtree(folder)
        return found

    def _plan(self, cost: float, preparation: float, *, corrected: bool) -> Probe:
        """Computes the number of iterations that fit the budget, and stores it for a restart."""
        budget = self.settings.minutes * 60 - preparation
        if budget < cost:
            raise TrainingFailed(
                f"its preparation takes {preparation / 60:.1f} minutes and an iteration {cost:.1f} s, which is more than "
                f"the budget of {self.settings.minutes:g} minutes"
            )
        return Probe(
            recipe_sha256=self.entry.sha256,
            seconds_per_iteration=cost,
            preparation_seconds=preparation,
            iterations=int(budget / cost),
            corrected=corrected,
        ).write(self.folder / COST)

    def _spent(self, done: Finished, what: Literal["", "preparation_"]) -> float:
        """Seconds of training, or of preparation, in the budget's kind of time."""
        if self.settings.by == "clock":
            return float(done.metrics[f"{what or 'training_'}seconds"])
        return float(done.metrics[f"{what}processor_seconds"]) / self.settings.threads

    def _run(self, name: str, spec: dict[str, Any], descriptor: int, store: Path | None = None) -> Finished:
        """Runs one process of ``python -m distillers``; returns the event that it ended with."""
        folder = self.folder / name
        job = self.folder / f"{name}.json"
        job.write_text(json.dumps(spec, indent=1) + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "distillers", str(job), "--folder", str(folder)]
        command += [
            "--store",
            str(store or self.work / "store"),
            "--cache",
            str(self.work / "data"),
            "--resume",
            "--replace",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.settings.threads), "TOKENIZERS_PARALLELISM": "false"}
        log = self.folder / f"{name}.log"
        ended = watched(command, self.folder / "watch.json", log, environment=environment, keep=descriptor)
        if name == "job":
            with self._attempts.open("a") as file:
                file.write(json.dumps(asdict(ended)) + "\n")
        last = next((event for event in reversed(events(folder)) if isinstance(event, Finished | Failed)), None)
        if ended.status == 0 and isinstance(last, Finished):
            return last
        if ended.status == 1 and isinstance(last, Failed):
            raise TrainingFailed(last.message)
        raise ChildProcessError(f"the {name} of {self.entry.name} ended with status {ended.status}: see {log}")


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Locks the folder for as long as this process, or one that inherits the descriptor, is alive.

    So if a board was killed but its training is still running, that training is not started a second time.

    Raises:
        Busy: another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"another process is training in {folder}: wait for it, or end it") from None
        yield descriptor
    finally:
        os.close(descriptor)


def events(folder: Path) -> list[AnyEvent]:
    """The events of the job in the folder so far; a line truncated by a crash is ignored."""
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [EVENTS.validate_json(line) for line in lines if line.endswith("\n")]
