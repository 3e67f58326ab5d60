"""Measures the teacher and the students of a board with one protocol (`distillers.evaluation.measure`)."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from distillers.evaluation import report
from distillers.evaluation.cache import Cache
from distillers.evaluation.features import Extractor
from distillers.evaluation.leaderboard.records import UNTRAINED, Machine, Row, Teacher
from distillers.evaluation.measure import Evaluation, Track
from distillers.evaluation.models import student_model
from distillers.evaluation.protocol import Protocol
from distillers.evaluation.subjects import STEPS, Model, Subject
from distillers.methods.few_step import default_schedules
from weights.bundled import resolve_base
from weights.contracts import BaseReference, StepSchedule, StudentManifest
from weights.families import load
from weights.store import Store, digest_base
from weights.students import check_base
from weights.version import code_version

CURVE_STEPS = (8, 16)
"""Further step counts at which the teacher is measured, for the figure's line."""


def machine(device: str) -> Machine:
    """This machine, now."""
    facts = report.machine(device)
    return Machine(
        processor=facts["processor"],
        cores=facts["cores"],
        threads=facts["threads"],
        torch=facts["torch"],
        finished=report.now(),
    )


def untrained_student(base: Model, sha256: str, schedules: Mapping[int, StepSchedule]) -> Model:
    """The base's own weights, sampled like a student, without guidance.

    Every method's student starts as this control, at its recipe's times. A student that is no better has learned nothing
    that the protocol can measure.

    Args:
        base: the teacher.
        sha256: of its folder.
        schedules: by number of steps.
    """
    manifest = StudentManifest(
        name=UNTRAINED,
        created_at=datetime.now(UTC),
        method=UNTRAINED,
        family=base.pipeline.family,
        base=BaseReference(id=base.name, sha256=sha256),
        schedules=dict(schedules),
        code_version=code_version(),
    )
    return Model(UNTRAINED, base.pipeline, manifest)


class Measurer:
    """One `Evaluation` for all rows, which share the teacher, the real images and the alignment regression."""

    def __init__(
        self,
        protocol: Protocol,
        base: tuple[str, str],
        store: Path,
        extractor: Extractor,
        caches: tuple[Path, Path],
        track: Track,
        *,
        device: str,
        batch: int,
    ) -> None:
        """
        Args:
            protocol: of the evaluation.
            base: the teacher's family and its source.
            store: where the students are published.
            extractor: the feature extractor of all measurements.
            caches: folders for the base and for the students.
            track: progress.
            device: where to generate.
            batch: images generated at a time.
        """
        self.store, self.extractor, self.device = Store(store), extractor, device
        family, source = base
        self.sha256 = digest_base(resolve_base(source))
        self.base = Model(Path(source).name, load(family, source, device))
        shared, own = (Cache(folder) for folder in caches)
        self.evaluation = Evaluation(protocol, self.base, [extractor], shared, own, track, batch)

    def teacher(self) -> Teacher:
        """Measures the teacher at its full step count, at few steps, and at some in between for the figure."""
        full = self.base.pipeline.default_steps
        few, between = ([steps for steps in some if steps < full] for some in (STEPS, CURVE_STEPS))
        rows = [self._row(self.base, steps, with_diversity=True) for steps in (full, *few)]
        rows += [self._row(self.base, steps, with_diversity=False) for steps in between]
        real = self.evaluation.real()
        return Teacher(
            name=self.base.name,
            guidance=self.base.pipeline.default_guidance,
            rows=rows,
            untrained=self._untrained(default_schedules()),
            floor_kernel_distance=real.floor[self.extractor.name].kernel_distance,
            real_r_precision=real.r_precision,
            machine=machine(self.device),
        )

    def student(self, name: str) -> list[Row]:
        """Measures a published student at those of 1, 2 and 4 steps that it has."""
        folder = self.store.open(name)
        check_base(folder, self.sha256)
        return self._rows(student_model(self.store, folder, self.base.pipeline))

    def control(self, name: str) -> list[Row]:
        """Measures the teacher's own weights as this student is sampled: in the same steps, at the same times."""
        return self._untrained(self.store.manifest(name).schedules)

    def _untrained(self, schedules: Mapping[int, StepSchedule]) -> list[Row]:
        return self._rows(untrained_student(self.base, self.sha256, schedules))

    def _rows(self, model: Model) -> list[Row]:
        return [self._row(model, steps, with_diversity=True) for steps in model.steps]

    def _row(self, model: Model, steps: int, *, with_diversity: bool) -> Row:
        subject = Subject(model, self.base, steps)
        quality = self.evaluation.quality(subject)
        distances = quality.distances[self.extractor.name]
        return Row(
            steps=steps,
            evaluations=quality.evaluations,
            milliseconds=quality.milliseconds,
            kernel_distance=distances.kernel_distance,
            captions_apart=True,
            frechet_distance=distances.frechet_distance,
            r_precision=quality.r_precision,
            diversity=self.evaluation.spread(subject).distance if with_diversity else None,
        )
