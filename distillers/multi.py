"""Multi-Student Distillation: partitions the prompts, trains a student on each part, and publishes a router over them.

Song et al. 2024, https://arxiv.org/abs/2410.23274; `distillers.partition` defines the partition. Part k is the same job
(method, settings, seed, iterations) on the prompts of part k, in the folder ``part-k``. Its student is published as
NAME-k as soon as it is done. Once all are done, NAME is published: a manifest without weights of its own, which routes
each prompt to one of the students.

Students of the teacher's size start from the teacher, as in every job. ``train.batch_size`` is per student: to compare
K students with one at the same cost, the paper trains each with a K-th of the batch. Parts share encoded data and a
regression's teacher pairs. In parallel order, each part is a process, and these are distributed over the GPUs.

A stopped job resumes with the part (or parts) that it was training; published parts are skipped. The job's events form
one stream: its steps are the sum over all parts, and the names of metrics, checkpoints and samples contain their part.
"""

import gc
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from distillers.checkpoint import checkpoints_in
from distillers.corpus import load_corpus
from distillers.job import STOPPED, JobRun, in_use, published
from distillers.merging import MergedEvents, PartReporter
from distillers.partition import FILE, Partition
from distillers.processes import Interrupted
from distillers.spec import BadSpec
from weights.contracts import StudentManifest
from weights.events import EVENTS, AnyEvent
from weights.families import load
from weights.files import write_atomically
from weights.students import base_reference
from weights.version import code_version

POLL_SECONDS = 0.5
SPENT = (
    "iterations",
    "training_seconds",
    "processor_seconds",
    "preparation_seconds",
    "preparation_processor_seconds",
)
"""Metrics of the router's manifest that are sums over the parts."""
GIVEN = ".job.json"
"""A parallel part's spec, in its folder, until its process ends. The part replaces its own, once it has accepted it."""
ASKED = (STOPPED, -signal.SIGTERM)
"""Exit statuses of a part that was asked to stop; the second one occurs while it still imports its libraries."""


class PartFailed(ValueError):
    """A part's job has failed; the message names the part and contains its own message."""


class MultiRun(JobRun):
    """A job with a partition: trains all parts and publishes the router."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """
        Args:
            arguments: as for a `JobRun`.
            options: as for a `JobRun`.

        Raises:
            BadSpec: the spec cannot be run.
        """
        super().__init__(*arguments, **options)
        assert self.job.partition is not None, "callers look"
        self.given_cache: Path | None = options.get("cache")
        self.parallel = self.job.partition.order == "parallel"
        self.parts = dict(enumerate(self.job.parts))
        self.merged = MergedEvents(
            self.reporter, len(self.parts), self.job.train, parallel=self.parallel, accepted=self._write_spec
        )
        self._running: JobRun | None = None

    def stop(self, *_: Any) -> None:
        """Asks the job and its current part to stop."""
        super().stop()
        if self._running is not None:
            self._running.stop()

    def _published(self) -> StudentManifest | None:
        return self.store.made_by(self.job) if (self.folder / FILE).exists() else None

    def _make(self, resume: bool) -> StudentManifest | None:
        if self.parallel and self.accelerator.num_processes > 1:
            message = "'parallel' starts a process for each part: run it without accelerate launch, or use 'sequential'"
            raise BadSpec([{"param": "partition.order", "message": message}])
        done = {part for part, job in self.parts.items() if resume and published(job, self._folder(part), self.store)}
        for part in self.parts.keys() - done:
            self._refuse_taken_name(self.parts[part].student)
        begun = any(checkpoints_in(self._folder(part)) for part in self.parts)
        if begun and not resume:
            raise in_use(self.folder)
        if not begun and not (self.folder / FILE).exists():  # else once a part has accepted it
            self._write_spec()
        partition = self._cut()
        for part in done:
            self.merged.skip(part)
        waiting = [part for part in self.parts if part not in done]
        if self.parallel:
            self._run_together(waiting, resume)
        else:
            for part in waiting:
                self._run_here(part, resume)
        return self._publish_router(partition) if self.accelerator.is_main_process else None

    def _folder(self, part: int) -> Path:
        return self.folder / f"part-{part}"

    def _cut(self) -> Partition:
        """The partition in the folder, or a new one."""
        self.reference = base_reference(self.job.base)
        base = load(self.job.family, self.job.base, self.accelerator.device, torch.float32)
        return self._partition(load_corpus(self.job.data, base.size), base)

    @property
    def iterations(self) -> int:
        """Sum over all parts."""
        return self.merged.iterations

    def _position(self) -> tuple[int, str | None]:
        return self.merged.step, self.merged.last_checkpoint

    def _ended(self, part: int, status: int) -> None:
        """Returns if the part has ended well. Raises: Interrupted or PartFailed."""
        if status in ASKED:
            raise Interrupted(f"stopped in part {part}")
        if status != 0:
            how = (
                f"its process was killed by signal {-status}"
                if status < 0
                else f"its process ended with status {status}"
            )
            raise PartFailed(f"part {part}: {self.merged.failures.get(part, how)}")

    # Sequential

    def _run_here(self, part: int, resume: bool) -> None:
        self._running = JobRun(
            self.parts[part].model_dump(mode="json"),
            self._folder(part),
            self.store,
            cache=self.given_cache,
            replace=self.replace,
            shared=self.shared,
            reporter=PartReporter(self._folder(part), self.merged, part),
        )
        if self._stop:  # requested before the part could be told
            raise Interrupted(f"stopped before part {part}")
        try:
            self._ended(part, self._running.run(resume))
        finally:
            self._running = None
            gc.collect()  # a part's networks form reference cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # Parallel

    def _run_together(self, parts: list[int], resume: bool) -> None:
        events: queue.SimpleQueue[tuple[int, AnyEvent]] = queue.SimpleQueue()
        processes: dict[int, subprocess.Popen[str]] = {}
        readers = []
        try:
            for part in parts:
                processes[part] = self._launch(part, resume)
                reader = threading.Thread(target=_read, args=(part, processes[part], events))
                reader.start()
                readers.append(reader)
            self._follow(processes, events)
        finally:
            for process in processes.values():  # those still running save and exit
                process.terminate()
            for process in processes.values():
                process.wait()
            for reader in readers:
                reader.join()
            for part in processes:
                (self._folder(part) / GIVEN).unlink(missing_ok=True)
            while not events.empty():
                self.merged.take(*events.get())
        statuses = {part: process.returncode for part, process in processes.items()}
        # First the part that failed on its own, since the others were stopped because of it.
        for part, status in sorted(statuses.items(), key=lambda item: item[1] in (0, *ASKED)):
            self._ended(part, status)

    def _follow(
        self, processes: "dict[int, subprocess.Popen[str]]", events: "queue.SimpleQueue[tuple[int, AnyEvent]]"
    ) -> None:
        """Forwards events until all processes have ended, one has failed, or the job is asked to stop."""
        while not self._stop:
            try:
                self.merged.take(*events.get(timeout=POLL_SECONDS))
            except queue.Empty:
                statuses = [process.poll() for process in processes.values()]
                if all(status is not None for status in statuses) or any(statuses):
                    return

    def _launch(self, part: int, resume: bool) -> "subprocess.Popen[str]":
        folder = self._folder(part)
        spec = folder / GIVEN
        write_atomically(spec, self.parts[part].model_dump_json(indent=2) + "\n")
        options = {"--folder": folder, "--store": self.store.root, "--shared": self.shared}
        if self.given_cache is not None:
            options["--cache"] = self.given_cache
        command = [sys.executable, "-m", "distillers", str(spec)]
        command += [str(word) for option in options.items() for word in option]
        command += ["--resume"] * resume + ["--replace"] * self.replace
        # Same process group, so that ending the job's group ends its parts.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=os.environ | _device(part)
        )

    # The router

    def _publish_router(self, partition: Partition) -> StudentManifest:
        names = [part.student for part in self.parts.values()]
        members = [self.store.manifest(name) for name in names]
        first = members[0]
        manifest = first.model_copy(
            update={
                "name": self.job.student,
                "created_at": datetime.now(UTC),
                "router": partition.router(names),
                "job": self.job,
                "metrics": {
                    **{name: round(sum(member.metrics[name] for member in members), 3) for name in SPENT},
                    "router": partition.metrics,
                },
                "code_version": code_version(),
                "files": {},
            }
        )
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".publish-") as empty:
            return self.store.publish(manifest, Path(empty), replace=self.replace)


def _read(part: int, process: "subprocess.Popen[str]", events: "queue.SimpleQueue[tuple[int, AnyEvent]]") -> None:
    """Queues the events printed by a part's process until it ends; other lines come from libraries."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            try:
                events.put((part, EVENTS.validate_json(line)))
            except ValueError:
                continue


def _device(part: int) -> dict[str, str]:
    """Environment variables that give a part's process a GPU of its own, if there are several."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < 2:
        return {}
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = listed.split(",") if listed else [str(number) for number in range(count)]
    return {"CUDA_VISIBLE_DEVICES": visible[part % count]}
