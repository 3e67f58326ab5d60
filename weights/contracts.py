"""The data that crosses process boundaries: job specs and student manifests; `weights.events` has the events of jobs.

The service and the distillers exchange nothing else. The models are frozen and strict (an unknown field is an error),
and their error messages say what was given and what is allowed.
"""

import hashlib
import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, model_validator

NAME_PATTERN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
SHA256_PATTERN = r"^[0-9a-f]{64}$"
FORMAT_VERSION = 1


def check_name(name: str) -> str:
    """Return the name if it is valid: a folder name that cannot lead out of the store.

    Raises:
        ValueError: it does not match ``NAME_PATTERN``, or contains '..'.
    """
    if not NAME_PATTERN.fullmatch(name) or ".." in name:
        raise ValueError(
            f"{name!r} is not a valid name: use 1 to 64 lower-case letters, digits, '.', '_' or '-', "
            "starting and ending with a letter or digit, without '..'"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]
UnitTime = Annotated[float, Field(gt=0, le=1)]


class Contract(BaseModel):
    """Base class of every contract: frozen, without unknown fields, NaN or infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


RECOMBINED = "recombined"


class DataSpec(Contract):
    """The data that the job trains on."""

    source: str = Field("emoji", description="'emoji' (bundled), or a folder with metadata.jsonl and its images")
    prompts: str | None = Field(
        None,
        description="text file with one prompt per line, instead of the source's captions; with source 'emoji' also "
        f"'{RECOMBINED}': captions of emoji that do not exist, besides those of the images",
    )

    @property
    def recombines(self) -> bool:
        """Whether prompts are recombined from the bundled captions."""
        return self.source == "emoji" and self.prompts == RECOMBINED


class LoraSpec(Contract):
    """Low-rank adapters, trained instead of the full weights."""

    rank: int = Field(64, ge=1, le=1024)
    alpha: float | None = Field(None, gt=0, description="scale of the adapters; the rank if left out")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of their inputs dropped in the step that is trained")
    shared_base: bool = Field(
        False,
        description="keep one copy of the base's weights in memory, shared by the teacher and every network that trains "
        "adapters; in bfloat16 if training computes in it",
    )


class TrainSpec(Contract):
    """The trainer's settings, common to all methods."""

    iterations: int = Field(
        1000, ge=1, description="how often to run the method's full cycle (critic and student updates)"
    )
    max_minutes: float | None = Field(None, gt=0, description="stop and publish after this much training time")
    batch_size: int = Field(32, ge=1, description="images per forward pass and device")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes whose gradients are averaged for a step")
    seed: int = Field(0, ge=0, lt=2**31)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: bfloat16 if the device computes in it natively, else float32; decided when the job begins",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores if left out")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass: far less memory, a third more work"
    )
    capture: bool = Field(
        False,
        description="run each iteration as a CUDA graph: for small networks on one GPU, with score distillation or ADD",
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="decay of the weights' moving average; 0 turns it off")
    cooldown: float = Field(
        0.0, ge=0, le=1, description="final share of the iterations, over which the learning rates fall towards 0"
    )
    gradient_clip: float = Field(10.0, gt=0, description="largest gradient norm")
    log_every: int = Field(10, ge=1, description="iterations between reports; the last one is always reported")
    checkpoint_every: int = Field(200, ge=1)
    sample_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)


class PartitionSpec(Contract):
    """Several students from one job, each trained on a part of the prompts (Multi-Student Distillation)."""

    students: int = Field(
        ge=2, le=64, description="how many; student k is published as NAME-k, and NAME is a router over them"
    )
    by: Literal["kmeans", "groups"] = Field(
        "kmeans",
        description="kmeans: equally many prompts each, close together in the text encoder's space; groups: runs of the "
        "data's own consecutive groups ('group' in each line of metadata.jsonl; the emoji's categories)",
    )
    order: Literal["sequential", "parallel"] = Field(
        "sequential", description="one after another in one process, or all at once, each in a process of its own"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the initial k-means centroids")
    part: int | None = Field(
        None, ge=0, description="train only this part, under the job's own student name; all parts if left out"
    )

    @model_validator(mode="after")
    def _part_exists(self) -> Self:
        if self.part is not None and self.part >= self.students:
            raise ValueError(f"part: {self.part} must be below students, {self.students}")
        return self


class GuideSpec(Contract):
    """Autoguidance of the teacher, away from a worse version of itself (`weights.diffusion.guidance.AutoGuided`)."""

    student: Name = Field(
        description="published student of the same base that denoises as the teacher does, only worse: for example a "
        "smaller one, made by the method score_matching"
    )
    scale: float = Field(
        1.4,
        ge=1,
        description="w in worse + w (teacher - worse); 1.0 turns it off; under a guidance scale s, w - 1 counts s times",
    )


class DistillJob(Contract):
    """One distillation job: base, method, data, training settings, and the name to publish the student under."""

    student: Name = Field(description="name to publish the student under")
    method: str = Field(description="name of a method in distillers/methods")
    base: str = Field("emoji-base", description="bundled base, a diffusers pipeline folder, or a hub id")
    family: str = Field("auto", description="family in weights/families; auto: the one that loads the base's pipeline")
    network: dict[str, Any] | None = Field(
        None,
        description="the student's network, if it is not the base's: the settings of its configuration that differ, such "
        "as {block_out_channels = [32, 64, 128]}; it starts from random weights (see the method score_matching)",
    )
    start: Name | None = Field(
        None,
        description="published student whose weights training continues from; the base's weights if left out",
    )
    guide: GuideSpec | None = Field(None, description="autoguidance of the teacher, with any method; none if left out")
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    lora: LoraSpec | None = Field(None, description="train low-rank adapters; full fine-tuning if left out")
    partition: PartitionSpec | None = Field(
        None, description="train several students, each on a part of the prompts; one student if left out"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="the method's own settings")
    licence: str = Field("unspecified", description="licence of the student's weights")

    @property
    def parts(self) -> list["DistillJob"]:
        """The jobs that this one splits into, one per student; empty if it trains a single student itself."""
        if self.partition is None or self.partition.part is not None:
            return []
        return [
            self.model_copy(
                update={
                    "student": f"{self.student}-{part}",
                    "partition": self.partition.model_copy(update={"part": part}),
                }
            )
            for part in range(self.partition.students)
        ]

    @property
    def sha256(self) -> str:
        """Hash of the job as canonical JSON: identifies the job without revealing the folders that it reads."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    @property
    def publishes(self) -> list[str]:
        """Every name that the job publishes a student under."""
        return [self.student, *(part.student for part in self.parts)]


class StepSchedule(Contract):
    """How a student samples in a given number of steps.

    ``timesteps[i]`` is the noise level of the state that step i denoises. ``conditioning[i]`` is the time that the
    network is conditioned on, and whose alpha and sigma convert its output. The two differ only for students such as
    SDXL's one-step DMD2, which takes pure noise at conditioning timestep 399 of 1000.
    """

    timesteps: list[UnitTime] = Field(min_length=1, max_length=64, description="falling; t = 1 is noise")
    conditioning: list[UnitTime] | None = Field(None, description="as many as timesteps; the same times if left out")
    sampler: Literal["consistency", "ddim"] = Field(
        "consistency", description="consistency: predict x0, then add fresh noise for the next step; ddim: uses eta"
    )
    eta: float = Field(0.0, ge=0, le=1, description="ddim only: 0 is deterministic, 1 is ancestral")

    @model_validator(mode="after")
    def _times_fall(self) -> Self:
        if any(b >= a for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError(f"timesteps must fall, from noise (1) towards the image (0), got {self.timesteps}")
        if self.conditioning is not None and len(self.conditioning) != len(self.timesteps):
            raise ValueError(f"{len(self.conditioning)} conditioning times for {len(self.timesteps)} timesteps")
        return self

    @property
    def network_times(self) -> list[float]:
        """The times that the network is conditioned on, one per step."""
        return self.conditioning if self.conditioning is not None else self.timesteps


class BaseReference(Contract):
    """The base a student was made from. It supplies the components that training did not change."""

    id: str = Field(description="bundled name, folder, or hub id")
    sha256: str = Field(pattern=SHA256_PATTERN, description="digest of the base's weight files; see store.digest_base")


class FileRecord(Contract):
    """Size and hash of one file of a student, as published."""

    sha256: str = Field(pattern=SHA256_PATTERN)
    size: int = Field(ge=0, description="in bytes")


class GuidanceConvention(Contract):
    """Classifier-free guidance (``uncond + w (cond - uncond)``; 1.0 is off) in training and in sampling."""

    trained_scale: float = Field(1.0, ge=0, description="teacher's guidance scale that was distilled into the student")
    default_scale: float = Field(1.0, ge=0, description="guidance scale for requests that do not set one")
    embedded: tuple[float, float] | None = Field(
        None, description="(low, high) of the scales that the network is conditioned on, at no cost; null if it is not"
    )


class Diversity(Contract):
    """Calibration of the base's first steps, before the student's or instead of them ('Distilling Diversity and Control').

    The student goes on from its step ``skip``, at this step's own time or at ``until``. In the second case its remaining
    times are scaled to begin there, so with ``skip`` 0 the base's steps come before all of the student's.
    """

    base_steps: int = Field(1, ge=1, le=8, description="steps that the base takes before the student takes over")
    base_guidance: float = Field(1.0, ge=0, description="guidance of the base's steps; any but 1.0 doubles their cost")
    skip: int = Field(1, ge=0, description="index, from 0, of the student's step that takes over")
    start: float | None = Field(
        None, ge=1e-3, le=1, description="time that the base is told for pure noise; null: the student's own first time"
    )
    until: float | None = Field(
        None, ge=1e-3, lt=1, description="time at which the student takes over; null: the own time of its step skip"
    )
    unprompted: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="how far, in t, the base's first step goes without the prompt: from start to start - unprompted, in "
        "one evaluation; its other steps share the rest. 0 turns this off; otherwise base_steps must be at least 2",
    )

    @model_validator(mode="after")
    def _unprompted_is_a_step_of_several(self) -> Self:
        if self.unprompted > 0 and self.base_steps == 1:
            raise ValueError(
                f"unprompted: {self.unprompted:g} needs base_steps of at least 2: raise base_steps, or set unprompted to 0 "
                "(for a single step without the prompt, set base_guidance to 0)"
            )
        return self


class Router(Contract):
    """How a multi-student picks a student: the centroid nearest to the prompt's embedding (`weights.router.route`)."""

    centroids: list[list[FiniteFloat]] = Field(min_length=1, description="one unit vector per student")
    students: list[Name] = Field(min_length=1, description="published students of the same base, one per centroid")
    offsets: list[FiniteFloat] | None = Field(
        None, description="added to the prompt's cosine similarity with each centroid; none if left out"
    )

    @model_validator(mode="after")
    def _has_one_of_each(self) -> Self:
        count = len(self.students)
        if len(self.centroids) != count or len({len(centroid) for centroid in self.centroids}) != 1:
            lengths = [len(centroid) for centroid in self.centroids]
            raise ValueError(
                f"centroids of {lengths} numbers for {count} students: give one per student, all of the same length"
            )
        if self.offsets is not None and len(self.offsets) != count:
            raise ValueError(f"{len(self.offsets)} offsets for {count} students: give one for each")
        if len(set(self.students)) != count:
            raise ValueError(f"students {self.students} must differ")
        return self


class AveragedStudent(Contract):
    """One of the students that a weight average was made from."""

    name: Name = Field(description="name that it was published under; 'base' means the base's own weights")
    share: float = Field(gt=-1, lt=2, description="weight in the mean; below 0 for a base that is extrapolated from")
    sha256: str = Field(pattern=SHA256_PATTERN, description="digest of its weight files; see store.digest_folder")
    job: DistillJob | None = Field(None, description="the job that made it")


class ExtractedLora(Contract):
    """The fully fine-tuned student that a LoRA student's adapters approximate."""

    name: Name = Field(description="name that it was published under")
    sha256: str = Field(pattern=SHA256_PATTERN, description="digest of its weight files; see store.digest_folder")
    rank: int = Field(ge=1, description="rank of the adapters")
    kept: float = Field(ge=0, le=1, description="share of the squared change that the nearest adapters keep")
    fitted: int = Field(0, ge=0, description="updates in which they were then fitted to the student's predictions")
    differences: list[float] = Field([], description="mean squared difference to these predictions, before and after")


class StudentManifest(Contract):
    """``student.json``: what a student is, how to sample from it, and its measured quality."""

    format_version: Literal[1] = 1
    name: Name
    created_at: datetime
    method: str
    family: str
    base: BaseReference
    adapter: Literal["full", "lora"] = "full"
    lora_alpha: float | None = None
    schedules: dict[int, StepSchedule] = Field(min_length=1, description="by number of steps")
    guidance: GuidanceConvention = GuidanceConvention()
    diversity: Diversity | None = None
    router: Router | None = Field(
        None, description="picks one of several other students by the prompt; a router has no weights of its own"
    )
    job: DistillJob | None = None
    averaged: list[AveragedStudent] = Field(
        default_factory=list, description="students whose mean these weights are; empty if a job trained them"
    )
    extracted: ExtractedLora | None = Field(None, description="the student that these adapters approximate")
    metrics: dict[str, Any] = Field(default_factory=dict)
    licence: str = "unspecified"
    code_version: str
    files: dict[str, FileRecord] = Field(default_factory=dict, description="by path relative to the student's folder")

    @model_validator(mode="after")
    def _schedules_have_their_length(self) -> Self:
        for steps, schedule in self.schedules.items():
            if len(schedule.timesteps) != steps:
                raise ValueError(f"schedules: {steps} has {len(schedule.timesteps)} timesteps; give {steps}")
        return self
