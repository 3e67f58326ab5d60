"""Subjects of an evaluation: the base and its students, by number of steps, with or without the base's first step."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from distillers.evaluation.cache import Batch, digest, digest_modules
from weights.contracts import Diversity, StudentManifest
from weights.drawing import draw, draw_base
from weights.families.base import TextToImage
from weights.students import RoutedStudent
from weights.trajectory import CannotDraw, base_leg_times, schedule_for, student_trajectory

Leg = Literal["plain", "base first step", "first step skipped"]
STEPS = (1, 2, 4)


def counted(number: int, what: str) -> str:
    """A readable count: ``"1 step"``, ``"4 steps"``."""
    return f"{number} {what}" + ("s" if number != 1 else "")


@dataclass(frozen=True)
class Model:
    """The base, or one of its students (which has a manifest)."""

    name: str
    pipeline: TextToImage
    """The model that generates; for a routed student its base, which encodes prompts and decodes latents."""
    manifest: StudentManifest | None = None
    routed: RoutedStudent | None = None
    """The members of a routed student, each for its own prompts."""

    @cached_property
    def weights(self) -> str:
        """sha256 over all weights that affect the images."""
        if self.routed is None:
            return digest_modules(self.pipeline.components())
        members = [digest_modules(member.components()) for member in self.routed.members]
        return digest([members, self.routed.router.model_dump(exclude={"students"})])

    def split(self, prompts: Sequence[str]) -> list[tuple[TextToImage, list[int]]]:
        """The models that generate these prompts, each with the positions of its own."""
        if self.routed is None:
            return [(self.pipeline, list(range(len(prompts))))]
        return self.routed.split(list(prompts))

    @property
    def steps(self) -> list[int]:
        """The step counts to measure: those of the student among 1, 2 and 4, or all if there are none."""
        if self.manifest is None:
            return list(STEPS)
        own = sorted(self.manifest.schedules)
        return [steps for steps in own if steps in STEPS] or own


@dataclass(frozen=True)
class Subject:
    """A way to generate images: a model, a number of steps, and which model takes the first of them."""

    model: Model
    base: Model
    steps: int
    leg: Leg = "plain"
    calibration: Diversity | None = None
    """Calibration of the base leg; that of the manifest when None."""
    guidance: float = field(init=False)

    def __post_init__(self) -> None:
        manifest = self.model.manifest
        scale = self.model.pipeline.default_guidance if manifest is None else manifest.guidance.default_scale
        object.__setattr__(self, "guidance", scale)

    @property
    def title(self) -> str:
        """A readable title: ``"emoji-average, 4 steps, base first step"``."""
        leg = "" if self.leg == "plain" else f", {self.leg}"
        return f"{self.model.name}, {counted(self.steps, 'step')}{leg}"

    @property
    def slug(self) -> str:
        """The title as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def diversity(self) -> Diversity | None:
        """Calibration of the base leg: the given one, the manifest's, or one base step without guidance."""
        if self.leg == "plain" or self.model.manifest is None:
            return None
        return self.calibration or self.model.manifest.diversity or Diversity()

    @property
    def key(self) -> dict[str, Any]:
        """Everything that determines the images except prompts and seeds."""
        manifest, diversity = self.model.manifest, self.diversity
        return {
            "weights": self.model.weights,
            "base": self.base.weights if self.leg == "base first step" else None,
            "schedule": None if manifest is None else schedule_for(manifest.schedules, self.steps).model_dump(),
            "steps": self.steps,
            "guidance": self.guidance,
            "leg": self.leg,
            "diversity": None if diversity is None else diversity.model_dump(),
        }

    @torch.no_grad()
    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Batch:
        """Generates one image per prompt, through the code that the server uses."""
        pictures: dict[int, Tensor] = {}
        evaluations = 0
        for pipeline, places in self.model.split(prompts):
            own = self._draw(pipeline, [prompts[place] for place in places], [seeds[place] for place in places])
            pictures |= dict(zip(places, own.pictures, strict=True))
            evaluations = own.evaluations
        return Batch(torch.stack([pictures[place] for place in range(len(prompts))]), evaluations)

    def _draw(self, pipeline: TextToImage, prompts: list[str], seeds: list[int]) -> Batch:
        """Generates images for prompts of the same network."""
        manifest = self.model.manifest
        cond, uncond = pipeline.encode_prompts(prompts), pipeline.encode_prompts([""])
        if manifest is None:
            drawing = draw_base(pipeline, cond, uncond, seeds, self.steps, self.guidance)
        else:
            drawing = draw(
                pipeline,
                cond,
                uncond,
                seeds,
                schedule_for(manifest.schedules, self.steps),
                guidance_scale=self.guidance,
                base=self.base.pipeline,
                diversity=self.diversity,
                skip_only=self.leg == "first step skipped",
            )
        pictures = pipeline.decode(drawing.latents).float().add(1).mul(127.5).round().clamp(0, 255)
        return Batch(pictures.to(torch.uint8).cpu(), drawing.evaluations)

    def latency(self, prompt: str, repeats: int = 5) -> float:
        """Milliseconds for a single image, including text encoding and decoding: the median, after a warm-up."""
        self.draw([prompt], [0])
        seconds = []
        for seed in range(repeats):
            begun = time.perf_counter()
            self.draw([prompt], [seed])
            seconds.append(time.perf_counter() - begun)
        return 1000 * median(seconds)


def specific_subjects(base: Model, students: Sequence[Model]) -> list[Subject]:
    """Subjects for the specific captions: the base with its full steps (first: the teacher) and with few, and all
    students.

    Students are also measured with the base's first step, for its cost in quality, at every step count that has one.
    """
    subjects = [Subject(base, base, steps) for steps in [base.pipeline.default_steps, *base.steps]]
    for student in students:
        subjects += [Subject(student, base, steps) for steps in student.steps]
        subjects += [Subject(student, base, steps, "base first step") for steps in _led(student)]
    return subjects


def coarse_subjects(base: Model, students: Sequence[Model]) -> list[Subject]:
    """Subjects for the coarse prompts: the base, and students at their step counts, alone and with the base's first
    step. The control, without that step, is only at the largest.
    """
    subjects = [Subject(base, base, base.pipeline.default_steps)]
    for student in students:
        subjects += [Subject(student, base, steps) for steps in reversed(student.steps)]
        led = _led(student)[::-1]
        subjects += [Subject(student, base, steps, "base first step") for steps in led]
        subjects += [Subject(student, base, steps, "first step skipped") for steps in led[:1]]
    return subjects


def _led(student: Model) -> list[int]:
    """The step counts at which the base can begin."""
    return [steps for steps in student.steps if can_hand_over(student, steps)]


def can_hand_over(student: Model, steps: int) -> bool:
    """Whether the base can begin, and hand over to the student, at this step count: as calibrated, or else as usual."""
    if student.manifest is None:
        return False
    try:
        base_leg_times(schedule_for(student.manifest.schedules, steps), student.manifest.diversity or Diversity())
    except CannotDraw:
        return False
    return True


def evaluations(student: Model, base: Model, steps: int, diversity: Diversity | None) -> int:
    """Network evaluations per image of a student, with the base's first step(s) if ``diversity`` is given.

    Raises:
        CannotDraw: the base cannot hand over to the student.
    """
    manifest = student.manifest
    assert manifest is not None, "a student"
    return student_trajectory(
        student.pipeline.denoiser.schedule,
        schedule_for(manifest.schedules, steps),
        manifest.guidance.default_scale,
        tells_guidance=manifest.guidance.embedded is not None,
        diversity=diversity,
        base_tells_guidance=base.pipeline.denoiser.embeds_guidance,
    ).evaluations
