"""The data that crosses process boundaries: job specs, student manifests and progress events.

The service and the distillers exchange nothing else. The models are frozen and strict (an unknown field is an error),
and their error messages say what was given and what is allowed.
"""

import hashlib
import json
import re
from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, model_validator

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
            f"{name!r} is no valid name: use 1 to 64 lower-case letters, digits, '.', '_' or '-', "
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

    source: str = Field("emoji", description="'emoji' (bundled), or a folder with metadata.jsonl and pictures")
    prompts: str | None = Field(
        None,
        description="text file with one prompt a line, instead of the source's captions; with source 'emoji' also "
        f"'{RECOMBINED}': captions of emoji that do not exist, beside those of pictures",
    )

    @property
    def recombines(self) -> bool:
        """Whether prompts are recombined from the bundled captions."""
        return self.source == "emoji" and self.prompts == RECOMBINED


class LoraSpec(Contract):
    """Low-rank adapters, trained instead of the full weights."""

    rank: int = Field(64, ge=1, le=1024)
    alpha: float | None = Field(None, gt=0, description="scale; the rank when left out")
    dropout: float = Field(0.0, ge=0, lt=1)
    shared_base: bool = Field(
        False,
        description="hold the base's weights once in memory, for the teacher and for every network that trains adapters; "
        "in bfloat16 where training runs in it",
    )


class TrainSpec(Contract):
    """The trainer's settings, common to all methods."""

    iterations: int = Field(1000, ge=1, description="iterations of the method's full cycle (critic and student steps)")
    max_minutes: float | None = Field(None, gt=0, description="stop (and publish) after this much training time")
    batch_size: int = Field(32, ge=1, description="pictures per forward pass and device")
    gradient_accumulation: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**31)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the processor computes in it, else float32"
    )
    threads: int | None = Field(None, ge=1, description="CPU threads; all cores when left out")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: far less memory, a third more work"
    )
    capture: bool = Field(
        False,
        description="run each iteration as a CUDA graph: for small networks on one GPU, by score distillation or ADD",
    )
    ema_decay: float = Field(0.999, ge=0, lt=1, description="0 turns the average off")
    cooldown: float = Field(
        0.0, ge=0, le=1, description="share of the iterations, the last ones, over which learning rates fall towards 0"
    )
    gradient_clip: float = Field(10.0, gt=0, description="largest gradient norm")
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(200, ge=1)
    sample_every: int = Field(500, ge=1)
    keep_checkpoints: int = Field(2, ge=1)


class PartitionSpec(Contract):
    """Several students from one job, each trained on a part of the prompts (Multi-Student Distillation)."""

    students: int = Field(
        ge=2, le=64, description="K; student k is published as NAME-k, and NAME picks one by the prompt"
    )
    by: Literal["kmeans", "groups"] = Field(
        "kmeans",
        description="kmeans: equally many prompts each, near in the text encoder's space; groups: the data's own, "
        "neighbours together ('group' of each line of metadata.jsonl; the emoji's categories)",
    )
    order: Literal["sequential", "parallel"] = Field(
        "sequential", description="one after the other in one process, or all at once, each in a process of its own"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of the k-means' first centroids")
    part: int | None = Field(
        None, ge=0, description="train this part alone, under the job's own student name; all parts when left out"
    )

    @model_validator(mode="after")
    def _part_exists(self) -> Self:
        if self.part is not None and self.part >= self.students:
            raise ValueError(f"part: {self.part} must be below students, {self.students}")
        return self


class GuideSpec(Contract):
    """Autoguidance of the teacher, away from a worse version of itself (`weights.diffusion.guidance.AutoGuided`)."""

    student: Name = Field(
        description="published student of the same base that denoises as the teacher does, only worse: a smaller one, "
        "made by the method score_matching"
    )
    scale: float = Field(
        1.4,
        ge=1,
        description="w in worse + w (teacher - worse); 1.0 is off; under a guidance scale s, w - 1 counts s times",
    )


class DistillJob(Contract):
    """One distillation job: base, method, data, training settings, and the name to publish the student under."""

    student: Name = Field(description="name to publish the student under")
    method: str = Field(description="name of a method in distillers/methods")
    base: str = Field("emoji-base", description="bundled base, a diffusers pipeline folder, or a hub id")
    family: str = Field("stable_diffusion", description="name of a family in weights/families")
    network: dict[str, Any] | None = Field(
        None,
        description="the student's own network, where it is not the base's: the settings of its configuration that differ, "
        "such as {block_out_channels = [32, 64, 128]}; it starts from random weights (see the method score_matching)",
    )
    start: Name | None = Field(
        None,
        description="published student whose weights training goes on from (a later stage); the base's if left out",
    )
    guide: GuideSpec | None = Field(
        None, description="autoguidance of the teacher, with any method; none when left out"
    )
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    lora: LoraSpec | None = Field(None, description="train adapters of this shape; full fine-tuning when left out")
    partition: PartitionSpec | None = Field(
        None, description="several students, a part of the prompts each; one if left out"
    )
    config: dict[str, Any] = Field(default_factory=dict, description="the method's own Config")
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

    timesteps: list[UnitTime] = Field(min_length=1, max_length=64, description="falling, t = 1 is noise")
    conditioning: list[UnitTime] | None = Field(None, description="as long as timesteps; the same times when left out")
    sampler: Literal["consistency", "ddim"] = Field(
        "consistency", description="consistency: predict x0, add fresh noise for the next level; ddim: with eta"
    )
    eta: float = Field(0.0, ge=0, le=1, description="ddim only: 0 is deterministic, 1 is ancestral")

    @model_validator(mode="after")
    def _times_fall(self) -> Self:
        if any(b >= a for a, b in zip(self.timesteps, self.timesteps[1:], strict=False)):
            raise ValueError(f"timesteps must fall from noise to picture, got {self.timesteps}")
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
    sha256: str = Field(
        pattern=SHA256_PATTERN, description="digest over the base's weight files, see store.digest_base"
    )


class FileRecord(Contract):
    """Size and hash of one file of a student, as published."""

    sha256: str = Field(pattern=SHA256_PATTERN)
    size: int = Field(ge=0, description="bytes")


class GuidanceConvention(Contract):
    """Classifier-free guidance (``uncond + w (cond - uncond)``; 1.0 is off) in training and in sampling."""

    trained_scale: float = Field(1.0, ge=0, description="teacher guidance that training baked into the student")
    default_scale: float = Field(1.0, ge=0, description="what to draw with when a request does not say")
    embedded: tuple[float, float] | None = Field(
        None, description="(low, high): scales that the network is told instead, at no cost; null where it is told none"
    )


class Diversity(Contract):
    """Calibration of the base's first steps, which replace the student's (see 'Distilling Diversity and Control')."""

    base_steps: int = Field(1, ge=1, le=8, description="network evaluations by the base before the student takes over")
    base_guidance: float = Field(1.0, ge=0, description="guidance of the base leg; anything but 1.0 doubles its cost")
    skip: int = Field(1, ge=1, description="index of the student's step that takes the latent over")
    unprompted: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="how far, in t, the base leg's first step goes without the prompt, for one evaluation: from pure noise, "
        "1, to 1 - unprompted; the other steps share the rest. 0 is none, above it takes 2 base_steps or more",
    )

    @model_validator(mode="after")
    def _unprompted_is_a_step_of_several(self) -> Self:
        if self.unprompted > 0 and self.base_steps == 1:
            raise ValueError(
                f"unprompted: {self.unprompted:g} with a leg of one step: make it 0, or base_steps 2 or more (a single step "
                "without the prompt is base_guidance 0)"
            )
        return self


class Router(Contract):
    """How a multi-student picks a student: the centroid nearest to the prompt's embedding (`weights.router.route`)."""

    centroids: list[list[FiniteFloat]] = Field(min_length=1, description="one a student, of length 1")
    students: list[Name] = Field(min_length=1, description="published students of the same base, a centroid each")
    offsets: list[FiniteFloat] | None = Field(
        None, description="added to the prompt's cosine with each centroid; none when left out"
    )

    @model_validator(mode="after")
    def _has_one_of_each(self) -> Self:
        count = len(self.students)
        if len(self.centroids) != count or len({len(centroid) for centroid in self.centroids}) != 1:
            lengths = [len(centroid) for centroid in self.centroids]
            raise ValueError(
                f"centroids of {lengths} numbers for {count} students: want one of the same length for each"
            )
        if self.offsets is not None and len(self.offsets) != count:
            raise ValueError(f"{len(self.offsets)} offsets for {count} students: want one for each")
        if len(set(self.students)) != count:
            raise ValueError(f"students {self.students} must differ")
        return self


class AveragedStudent(Contract):
    """One of the students that a weight average was made from."""

    name: Name = Field(description="what it was published as; 'base' is the base's own weights")
    share: float = Field(
        gt=-1,
        lt=2,
        description="of the mean; the base's is below 0, and the others' sum above 1, where it goes on past them",
    )
    sha256: str = Field(pattern=SHA256_PATTERN, description="digest over its weight files, see store.digest_folder")
    job: DistillJob | None = Field(None, description="that made it")


class ExtractedLora(Contract):
    """The fully fine-tuned student that a LoRA student's adapters approximate."""

    name: Name = Field(description="what it was published as")
    sha256: str = Field(pattern=SHA256_PATTERN, description="digest over its weight files, see store.digest_folder")
    rank: int = Field(ge=1, description="of the adapters")
    kept: float = Field(ge=0, le=1, description="share of the squared change from the base that the adapters hold")


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
        None, description="draw each prompt with one of several other students; there are no weights of its own then"
    )
    job: DistillJob | None = None
    averaged: list[AveragedStudent] = Field(
        default_factory=list, description="students whose weights these are the mean of; none for a job's own"
    )
    extracted: ExtractedLora | None = Field(None, description="whose change from the base these adapters hold")
    metrics: dict[str, Any] = Field(default_factory=dict)
    licence: str = "unspecified"
    code_version: str
    files: dict[str, FileRecord] = Field(default_factory=dict, description="by path relative to the student's folder")

    @model_validator(mode="after")
    def _schedules_have_their_length(self) -> Self:
        for steps, schedule in self.schedules.items():
            if len(schedule.timesteps) != steps:
                raise ValueError(f"schedule {steps} has {len(schedule.timesteps)} timesteps, want {steps}")
        return self


class Event(Contract):
    """One line that a running job writes to its events file and to standard output."""

    at: datetime
    step: int = Field(ge=0)


class Started(Event):
    kind: Literal["started"] = "started"
    iterations: int
    resumed_from: int = 0


class Progress(Event):
    kind: Literal["progress"] = "progress"
    iterations: int
    metrics: dict[str, float]
    seconds_left: float | None = None


class Saved(Event):
    kind: Literal["checkpoint", "samples"]
    path: str = Field(description="relative to the job's folder")


class Finished(Event):
    kind: Literal["finished"] = "finished"
    student: Name
    seconds: float
    metrics: dict[str, Any] = Field(default_factory=dict)


class Failed(Event):
    kind: Literal["failed"] = "failed"
    message: str
    last_checkpoint: str | None = None


AnyEvent = Annotated[Started | Progress | Saved | Finished | Failed, Field(discriminator="kind")]
EVENTS: TypeAdapter[AnyEvent] = TypeAdapter(AnyEvent)
