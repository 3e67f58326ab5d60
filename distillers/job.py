"""Runs one job, from its spec to a published student."""

import hashlib
import math
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from distillers.adapters import save_adapters
from distillers.building import Builder
from distillers.captured import check_place
from distillers.checkpoint import checkpoints_in
from distillers.corpus import Corpus, load_corpus
from distillers.data import Feed, cached_embeddings, floats
from distillers.events import Reporter, now
from distillers.failures import described
from distillers.identity import began_in, identity_of
from distillers.methods import method
from distillers.methods.base import Method, Workspace
from distillers.partition import Partition, part_of, stored_partition
from distillers.precision import resolve_precision
from distillers.processes import Interrupted, Tick, main_first
from distillers.seeds import seed_of
from distillers.sheets import Sheet
from distillers.spec import BadSpec, check_spec
from distillers.stopwatch import Stopwatch
from distillers.trainer import Trainer
from weights.contracts import BaseReference, DistillJob, GuidanceConvention, StudentManifest
from weights.events import Failed, Finished
from weights.families import load
from weights.families.base import TextToImage
from weights.files import write_atomically
from weights.store import Store
from weights.students import base_reference
from weights.version import code_version

STOPPED = 143
"""Exit status after SIGTERM, as a shell reports it; also used for SIGINT (Ctrl-C), which has the same effect."""
ASKING = (signal.SIGTERM, signal.SIGINT)
"""Signals that ask a job to save and stop."""
SPEC = "job.json"
"""The job's spec, in its folder."""


class JobRun:
    """A running job: builds its components in order, trains and publishes."""

    reference: BaseReference

    def __init__(
        self,
        raw: dict[str, Any],
        folder: Path,
        store: Store,
        *,
        cache: Path | None = None,
        replace: bool = False,
        shared: Path | None = None,
        reporter: Reporter | None = None,
    ) -> None:
        """
        Args:
            raw: the spec as read.
            folder: the job's own; created if missing.
            store: where the student is published.
            cache: folder of encoded captions and images, shared between jobs and therefore filled however short this
                one is. When left out, it is in ``shared``, and filled if that is worthwhile.
            replace: replace an existing student of that name.
            shared: folder shared by the parts of a partition, for the partition and teacher pairs; ``folder`` when left
                out.
            reporter: receives the events; when left out, they go to ``folder`` and standard output.

        Raises:
            BadSpec: the spec cannot be run.
        """
        self.job, self.config = check_spec(raw)
        self.folder = folder
        self.store = store
        self.shared = shared or folder
        self.cache = cache or self.shared / "cache"
        self.shares_cache = cache is not None
        self.replace = replace
        if self.job.train.threads is not None:
            torch.set_num_threads(self.job.train.threads)
        # Passed explicitly, since accelerate joins processes on CPUs into one job only if the CPU is requested.
        # Nor may it choose an Apple GPU, which has no float64.
        on_cpu = not torch.cuda.is_available()
        device = PartialState(cpu=on_cpu).device
        self.precision = self._precision(device)
        self.accelerator = Accelerator(
            cpu=on_cpu,
            mixed_precision="bf16" if self.precision == "bfloat16" else "no",
            # The trainer divides by the micro-batches itself; by default, a launcher's settings would divide once more.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        self.reporter = reporter or Reporter(folder, main=self.accelerator.is_main_process)
        self.trainer: Trainer | None = None
        self.preparation = Stopwatch()
        self.centroids = torch.empty(0)  # those of the partition that this job is a part of
        self._stop = False

    def _precision(self, device: torch.device) -> str:
        """The number format: "auto" is decided when a job begins, and kept where another device resumes it."""
        asked = self.job.train.precision
        began = began_in([self.folder, *sorted(self.shared.glob("part-*"))]) if asked == "auto" else None
        return began or resolve_precision(asked, device)

    def run(self, resume: bool) -> int:
        """Trains and publishes.

        Args:
            resume: continue from the newest checkpoint in the folder, if there is one.

        Returns:
            The exit status of the process: 0, 1 after a failure, 143 after SIGTERM or SIGINT.
        """
        with self.reporter:
            try:
                self._train_and_publish(resume)
            except Interrupted:
                return STOPPED
            except Exception as error:  # noqa: BLE001 (every failure becomes an event; bugs are raised again)
                self._failed(error)
                return 1
        return 0

    def stop(self, *_: Any) -> None:
        """Signal handler: asks the job to save and stop at the next step. Another Ctrl-C interrupts it at once."""
        self._stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.trainer is not None:
            self.trainer.asked_to_stop = True

    def _train_and_publish(self, resume: bool) -> None:
        done = self._published() if resume else None
        if done is not None:  # killed between publishing and reporting it
            self._finished(done)
            return
        self._refuse_taken_name(self.job.student)
        self.store.check_writable()  # rather than find out after days of training
        if self.accelerator.is_main_process:
            self._clear_leftovers()
        previous = [(number, signal.signal(number, self.stop)) for number in ASKING]
        try:
            manifest = self._make(resume)
            if manifest is not None:
                self._finished(manifest)
        finally:
            for number, handler in previous:
                signal.signal(number, handler)

    def _make(self, resume: bool) -> StudentManifest | None:
        """Trains and publishes the student; returns None in processes that leave publishing to the main one."""
        trainer = self._build(resume)
        trainer.asked_to_stop = self._stop
        trainer.run()
        return self._publish(trainer) if self.accelerator.is_main_process else None

    def _finished(self, manifest: StudentManifest) -> None:
        step, seconds = int(manifest.metrics["iterations"]), float(manifest.metrics["training_seconds"])
        self.reporter.emit(
            Finished(at=now(), step=step, student=manifest.name, seconds=seconds, metrics=manifest.metrics)
        )

    def _published(self) -> StudentManifest | None:
        """The student, if this very job has already published it from the checkpoints in the folder."""
        return published(self.job, self.folder, self.store)

    def _refuse_taken_name(self, name: str) -> None:
        """Rejects names that are taken in the store. Bundled students are no obstacle: the new student hides them."""
        taken = (self.store.root / name).exists()
        if taken and not self.replace:
            raise BadSpec(
                [{"param": "student", "message": f"{name!r} is already published: use another name, or --replace"}]
            )

    def _clear_leftovers(self) -> None:
        """Deletes what a killed attempt was writing, which may be as large as a checkpoint."""
        for leftover in [*self.folder.glob("checkpoints/.*.tmp"), *self.folder.glob(".publish-*")]:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    @property
    def iterations(self) -> int:
        """Total iterations of the job."""
        return self.job.train.iterations

    def _tick(self, what: str, done: int, total: int) -> None:
        self.reporter.preparing(what, done, total, step=self._position()[0], iterations=self.iterations)
        if self._stop:
            raise Interrupted(f"stopped while {what}")

    def _build(self, resume: bool) -> Trainer:
        job, device = self.job, self.accelerator.device
        if job.train.capture:
            check_place(self.accelerator)  # before anything slow
        if not checkpoints_in(self.folder):
            self._write_spec()
        elif not resume:
            raise in_use(self.folder)
        torch.manual_seed(seed_of(job.train.seed, "build"))  # heads and adapters are initialised at random
        self.reference = base_reference(job.base)
        base = load(job.family, job.base, device, torch.float32)
        chosen = method(job.method)
        feed = Feed(
            self._corpus(base),
            base,
            device=device,
            batch_size=job.train.batch_size,
            seed=job.train.seed,
            with_pictures=self.with_pictures,
            told_scale=self.config.teacher_scale if base.denoiser.embeds_guidance else None,
        )
        train = job.train
        draws: float = train.iterations * train.batch_size * train.gradient_accumulation
        draws *= job.partition.students if job.partition is not None else 1  # the parts share the caches
        if self.shares_cache:  # later jobs use it too
            draws = math.inf

        def prepare(tick: Tick) -> None:
            feed.prepare(self.cache, self.reference.sha256, draws, tick)

        main_first(prepare, self._tick, device)
        self.uncond = feed.told(base.encode_prompts([""]))
        builder = self._builder(base)
        built = builder.method(chosen, self.config, self.uncond)
        trainer = self.trainer = Trainer(
            built,
            feed,
            train,
            accelerator=self.accelerator,
            folder=self.folder,
            reporter=self.reporter,
            identity=identity_of(job, self.config, *builder.teaching(), precision=self.precision),
            sheet=self._sheet(feed, built),
        )
        self._resume(trainer)
        with self.preparation:
            built.prepare(self._workspace(feed, builder))
        return trainer

    def _write_spec(self) -> None:
        write_atomically(self.folder / SPEC, self.job.model_dump_json(indent=2) + "\n")

    @property
    def with_pictures(self) -> bool:
        """Whether the method uses real images."""
        return method(self.job.method).needs_pictures(self.config) is not None

    def _corpus(self, base: TextToImage) -> Corpus:
        """The training data of this job: all of it, or the part of the partition that the job is for."""
        corpus, spec = load_corpus(self.job.data, base.size), self.job.partition
        if spec is None or spec.part is None:
            return corpus
        partition = self._partition(corpus, base)
        self.centroids = partition.centroids
        return part_of(corpus, partition, spec.part, self.with_pictures)

    def _partition(self, corpus: Corpus, base: TextToImage) -> Partition:
        spec = self.job.partition
        assert spec is not None, "asked for by jobs that have one"
        digest = self.reference.sha256

        def cut(tick: Tick) -> Partition:
            def embed(prompts: list[str]) -> Tensor:
                return cached_embeddings(self.cache, digest, base, prompts, tick)

            return stored_partition(self.shared, spec, corpus, digest, embed, self.with_pictures)

        return main_first(cut, self._tick, self.accelerator.device)

    def _builder(self, base: TextToImage) -> Builder:
        return Builder(
            job=self.job,
            base=base,
            reference=self.reference,
            store=self.store,
            centroids=self.centroids,
            device=self.accelerator.device,
            precision=self.precision,
        )

    def _sheet(self, feed: Feed, built: Method) -> Sheet:
        prompts = feed.corpus.sheet
        encoded = floats(feed.base.encode_prompts(prompts))
        cond = {name: tensor.to(self.accelerator.device) for name, tensor in encoded.items()}
        scale = self._guidance(built).default_scale
        return Sheet(prompts, cond, built.schedules(), self.job.train.seed, scale, self.uncond)

    def _guidance(self, built: Method) -> GuidanceConvention:
        """The student's; one that embeds guidance, as its base does, was told the teacher's scale and no other."""
        own, scale = built.guidance(), self.config.teacher_scale
        if own.embedded is not None or not built.student.denoiser.embeds_guidance:
            return own
        return GuidanceConvention(trained_scale=scale, default_scale=scale, embedded=(scale, scale))

    def _workspace(self, feed: Feed, builder: Builder) -> Workspace:
        """The workspace of `Method.prepare`; other prompts, seeds or teachers get other folders."""
        made_from = "\n".join([*builder.teaching(), str(self.job.guide), str(self.job.train.seed), feed.identity])
        folder = self.shared / "prepared" / hashlib.sha256(made_from.encode()).hexdigest()[:20]
        folder.mkdir(parents=True, exist_ok=True)

        def seed(*parts: int | str) -> int:
            return seed_of(self.job.train.seed, *parts)

        return Workspace(
            folder=folder, prompts=feed.prompts, conditions=feed.prompt_conditions, seed=seed, tick=self._tick
        )

    def _resume(self, trainer: Trainer) -> None:
        """Continues from the newest checkpoint, if there is one; only then does this job's spec replace the former."""
        latest = trainer.latest_checkpoint()
        if latest is None:
            return
        trainer.load(latest)
        self._write_spec()

    def _publish(self, trainer: Trainer) -> StudentManifest:
        student = trainer.method.student
        manifest = StudentManifest(
            name=self.job.student,
            created_at=now(),
            method=self.job.method,
            family=student.family,
            base=self.reference,
            adapter="full" if self.job.lora is None else "lora",
            lora_alpha=None if self.job.lora is None else self.job.lora.alpha or self.job.lora.rank,
            schedules=trainer.method.schedules(),
            guidance=self._guidance(trainer.method),
            job=self.job,
            metrics={
                "iterations": trainer.iteration,
                "training_seconds": round(trainer.time.seconds, 1),
                "processor_seconds": round(trainer.time.processor_seconds, 3),
                "preparation_seconds": round(self.preparation.seconds, 3),
                "preparation_processor_seconds": round(self.preparation.processor_seconds, 3),
            },
            licence=self.job.licence,
            code_version=code_version(),
        )
        with trainer.averaged(), tempfile.TemporaryDirectory(dir=self.folder, prefix=".publish-") as temporary:
            if self.job.lora is None:
                student.save_network(Path(temporary), torch.float16)
            else:
                save_adapters(student, Path(temporary))
            return self.store.publish(manifest, Path(temporary), replace=self.replace)

    def _failed(self, error: Exception) -> None:
        step, checkpoint = self._position()
        message, expected = described(error, self.job.train.batch_size)
        try:
            self.reporter.emit(Failed(at=now(), step=step, message=message, last_checkpoint=checkpoint))
        except OSError as unwritable:  # most likely what ended the job: a full disk
            print(f"{message} (and events cannot be written: {unwritable})", file=sys.stderr)
        if not self.accelerator.is_main_process:  # its reporter writes nothing
            print(f"process {self.accelerator.process_index}: {message}", file=sys.stderr)
        if not expected:
            raise error

    def _position(self) -> tuple[int, str | None]:
        """The current iteration, and the newest checkpoint's path relative to the folder."""
        if self.trainer is None:
            return 0, None
        latest = self.trainer.latest_checkpoint()
        return self.trainer.iteration, str(latest.relative_to(self.folder)) if latest else None


def in_use(folder: Path) -> BadSpec:
    """The error of a job that was not told to resume, in a folder with checkpoints."""
    message = f"{folder} holds a job's checkpoints: use --resume, or another folder"
    return BadSpec([{"param": "--folder", "message": message}])


def published(job: DistillJob, folder: Path, store: Store) -> StudentManifest | None:
    """The student, if this very job has already published it from the checkpoints in the folder."""
    return store.made_by(job) if checkpoints_in(folder) else None
