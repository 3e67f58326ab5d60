"""Trains one entry inside its budget: a probe tells what an iteration costs, the iterations follow, a process runs them.

The budget is minutes, but learning rates fall by iterations, never by the clock. So their number is fixed before
training starts: a throw-away run of the same job, at the same number of threads, is timed for a while. What training then
took is measured again; where it missed the budget by more than a tenth, as methods with phases may, it is done once more
with the iterations that the whole run's cost allows. On the CPU the minutes are the processor's, divided by the threads:
other work on the machine takes nothing from a method. With a GPU they are the clock's.
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
from weights.contracts import EVENTS, AnyEvent, Failed, Finished

COST = "cost.json"
"""Where what a probe has measured is kept; the probe's own spec is probe.json."""
ENDLESS = 10**6
"""Iterations of a probe, which the clock stops."""
CHECKPOINT_SECONDS = 60


class TrainingFailed(RuntimeError):
    """The job says that it cannot be trained; the message is its own."""


class Stale(RuntimeError):
    """What is there was made by another version of the recipe."""


class Busy(RuntimeError):
    """Another process works in the folder."""


class Trainee:
    """One entry's training in its folder of the board."""

    def __init__(self, entry: Entry, folder: Path, settings: Settings, work: Path, probe_seconds: float) -> None:
        """
        Args:
            entry: the recipe.
            folder: the entry's own; a training that was stopped goes on from what it holds.
            settings: the board's.
            work: the board's folder; its cache of encoded data and its store are shared by all entries.
            probe_seconds: training time of the probe.
        """
        self.entry, self.folder, self.settings, self.work = entry, folder, settings, work
        self.probe_seconds = probe_seconds

    def train(self, descriptor: int) -> Training:
        """What training took; trains where that is not known yet.

        Args:
            descriptor: of the folder's lock (`locked`), which the processes that train inherit.

        Raises:
            TrainingFailed: the job failed.
            ChildProcessError: its process was ended, but not by us; another call goes on from its last checkpoint.
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
        for folder in list((self.folder / "job").rglob("checkpoints")):  # the students are published; these are large
            shutil.rmtree(folder)
        return made

    def _trained(self, probe: Probe, descriptor: int) -> Training:
        """Runs the job, or what is left of it."""
        every = max(1, round(CHECKPOINT_SECONDS / max(probe.seconds_per_iteration, 1e-3)))
        done = self._run("job", self._job(probe.iterations, None, every), descriptor)
        attempts = [Watched(**json.loads(line)) for line in self._attempts.read_text().splitlines()]
        return Training(
            iterations=done.metrics["iterations"],
            # Prepared in an earlier attempt, it is as good as free in the last one; the probe's was made in one go.
            seconds=self._spent(done, "") + max(probe.preparation_seconds, self._spent(done, "preparation_")),
            clock_seconds=done.metrics["training_seconds"] + done.metrics["preparation_seconds"],
            pictures=self.entry.job.train.batch_size * self.entry.job.train.gradient_accumulation,
            peak_bytes=max(attempt.peak_bytes for attempt in attempts),
            attempts=len(attempts),
        )

    def _corrected(self, probe: Probe, made: Training) -> Probe:
        """The plan from what the whole training cost: methods with phases cost another than at their start.

        The training that missed the budget is dropped, and its student replaced.
        """
        cost = (made.seconds - probe.preparation_seconds) / made.iterations
        shutil.rmtree(self.folder / "job")
        self._attempts.unlink()
        return self._plan(cost, probe.preparation_seconds, corrected=True)

    def probe(self) -> Probe | None:
        """What was measured before training, where it was.

        Raises:
            Stale: of another version of the recipe.
        """
        known = read(Probe, self.folder / COST)
        if known is not None and known.recipe_sha256 != self.entry.sha256:
            raise Stale(f"the recipe of {self.entry.name} has changed since: delete {self.folder} to train it anew")
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
        """What the budget buys, kept for a restart."""
        budget = self.settings.minutes * 60 - preparation
        if budget < cost:
            raise TrainingFailed(
                f"its preparation takes {preparation / 60:.1f} minutes, an iteration {cost:.1f} s: that is more than the "
                f"budget of {self.settings.minutes:g} minutes"
            )
        return Probe(
            recipe_sha256=self.entry.sha256,
            seconds_per_iteration=cost,
            preparation_seconds=preparation,
            iterations=int(budget / cost),
            corrected=corrected,
        ).write(self.folder / COST)

    def _spent(self, done: Finished, what: Literal["", "preparation_"]) -> float:
        """Seconds of training, or of what comes before it, as the budget is told."""
        if self.settings.by == "clock":
            return float(done.metrics[f"{what or 'training_'}seconds"])
        return float(done.metrics[f"{what}processor_seconds"]) / self.settings.threads

    def _run(self, name: str, spec: dict[str, Any], descriptor: int, store: Path | None = None) -> Finished:
        """One process of ``python -m distillers``; the event it ended with."""
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
    """The folder for us alone, as long as we or a process that inherits the descriptor lives.

    So a board that was killed outright, and whose training still runs, is not begun a second time beside it.

    Raises:
        Busy: another has it.
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
    """What the job in the folder has told so far; a line cut short by a crash is left out."""
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [EVENTS.validate_json(line) for line in lines if line.endswith("\n")]
