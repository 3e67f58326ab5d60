"""What a job is, and the interface of the job service. Nothing here depends on SQL, processes or HTTP.

A job is one submitted `weights.contracts.DistillJob`. It is ``queued`` until a supervisor claims it, ``running`` while
an attempt at it runs, and then ``succeeded``, ``failed`` or ``cancelled``. A failed or cancelled job can be queued
again and continues from its checkpoint. Each claim increments ``attempt``, and each time that a dead supervisor's job is
taken over increments ``losses``. Together they are the fencing token: every update of an attempt names both numbers, and
is refused if they are no longer the row's. So ``losses`` may start again only while no attempt runs: when a job is
resumed, or is queued again after a loss, if the lost attempt had saved a checkpoint.
"""

import os
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from weights.contracts import DistillJob

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED: frozenset[Status] = frozenset({"succeeded", "failed", "cancelled"})
RESUMABLE: frozenset[Status] = frozenset({"failed", "cancelled"})


@dataclass(frozen=True, kw_only=True)
class JobError:
    """Why a job failed: a sentence, a stable code, and the last lines that its process wrote to standard error."""

    message: str
    code: Literal["job_failed", "job_killed", "job_lost", "launch_failed", "spec_unreadable"]
    stderr: str = ""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job is, according to its last progress event."""

    step: int
    iterations: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds_left: float | None = None
    checkpoint_attempt: int | None = None
    """The attempt that saved the newest checkpoint; None before the first one."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row of the table. Times are seconds since the epoch."""

    number: int
    id: str
    status: Status
    spec: DistillJob
    created_at: float
    started_at: float | None = None
    finished_at: float | None = None
    error: JobError | None = None
    result: dict[str, Any] | None = None
    progress: Progress | None = None
    attempt: int = 0
    losses: int = 0
    """How often it was lost with its supervisor, without a new checkpoint in between."""
    owner: str | None = None
    device: str | None = None
    lease_until: float | None = None
    cancel_requested: bool = False
    unreadable: str | None = None
    """Why this version cannot read the spec, which another one wrote; ``spec`` then has only its student and method."""

    @property
    def ended(self) -> bool:
        """Whether the job has ended; only resuming can change it then."""
        return self.status in ENDED


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """One line of a job's events file. ``number`` is the line number, from 1."""

    number: int
    event: dict[str, Any]


class JobNotFound(LookupError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no distillation job {job_id[:80]!r}; GET /v1/distillation/jobs lists them")


class JobConflict(RuntimeError):
    """The request conflicts with the job's state, or with a name that is taken."""


class JobsUnavailable(RuntimeError):
    """The job table or the jobs' folder cannot be used; the message is one line that names it and the fix."""


class InvalidSpec(ValueError):
    """A job spec was refused.

    Attributes:
        param: dotted path of the field, such as ``train.batch_size`` or, in a batch, ``jobs.1.train.batch_size``.
        code: a stable identifier of the kind of error.
    """

    def __init__(self, message: str, param: str | None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CheckFailed(RuntimeError):
    """The spec could not be checked by the distillers: the server's fault, not the spec's."""


class Jobs(Protocol):
    """The job service, as routes and app use it. Any method that needs the table may raise `JobsUnavailable`."""

    async def start(self) -> None:
        """Open the table and, if this process runs jobs, start its supervisor."""

    async def stop(self) -> None:
        """Stop the supervisor: running attempts save a checkpoint, and their jobs return to the queue."""

    async def create(self, specs: Sequence[Any], *, batch: bool = False) -> list[Job]:
        """Validate specs (decoded JSON) and queue them in order, all or none.

        Args:
            specs: the job specs.
            batch: refer to fields as ``jobs.<index>.<field>`` in errors.

        Raises:
            InvalidSpec: a spec is invalid, or its student's name is taken.
            JobConflict: a job that has not ended is making a student of the same name.
        """

    async def list(self, limit: int, after: str | None = None) -> tuple[list[Job], bool]:
        """Up to ``limit`` jobs, newest first, following job ``after``; and whether there are more."""

    async def get(self, job_id: str) -> Job:
        """The job. Raises JobNotFound."""

    async def events(self, job_id: str, after: int, limit: int) -> tuple[Sequence[JobEvent], bool]:
        """Up to ``limit`` events after line ``after``, oldest first; and whether there are more."""

    def follow(self, job_id: str, after: int) -> AsyncIterator[JobEvent | Job | None]:
        """Yield events after line ``after`` as they occur, None after a silence, and finally the ended job."""

    async def needing(self, student: str) -> Job | None:
        """A job that has not ended and that starts from this student, or is guided by it."""

    async def cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once, or ask a running one to stop. Raises JobNotFound, or JobConflict if it ended."""

    async def resume(self, job_id: str) -> Job:
        """Queue a failed or cancelled job again. Raises JobNotFound or JobConflict."""


@dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings of the job service."""

    url: str
    folder: Path
    store: Path
    command: tuple[str, ...] = (sys.executable, "-m", "distillers")
    work: bool = True
    devices: tuple[str, ...] = ("auto",)
    reserved: Collection[str] = ()
    """Names that no student may take: those of bases, and aliases."""
    lease_seconds: float = 30.0
    poll_seconds: float = 1.0
    grace_seconds: float = 60.0
    check_seconds: float = 120.0
    max_losses: int = 3
    """How often a job may be lost, without a new checkpoint in between, before it fails."""
    keep_days: float | None = None
    """Days after its end for which a job's folder is kept whole; None: always."""

    def __post_init__(self) -> None:
        if self.lease_seconds < 3 * self.poll_seconds:
            raise ValueError(
                f"lease_seconds={self.lease_seconds} leaves no room for missed heartbeats: "
                f"give at least 3 times poll_seconds={self.poll_seconds}"
            )
        if not self.command:
            raise ValueError("command is empty: give the program that runs one job, such as `python -m distillers`")


def students_read(spec: DistillJob) -> list[str]:
    """The published students that a job loads whenever it is started: the one it starts from, and its guide."""
    guide = None if spec.guide is None else spec.guide.student
    return [name for name in (spec.start, guide) if name is not None]


def find_devices(wanted: Sequence[str]) -> tuple[str, ...]:
    """The devices that each run one job: ``auto`` is every NVIDIA GPU, or the CPU if there is none.

    If CUDA_VISIBLE_DEVICES is set, the GPUs are those it lists, numbered from 0.

    Raises:
        ValueError: something other than just ``auto``, or ``cpu`` and ``cuda:N``.
    """
    if tuple(wanted) != ("auto",):
        for device in wanted:
            device_environment(device)
        return tuple(dict.fromkeys(wanted))
    visible = visible_gpus()
    if visible is not None:
        return tuple(f"cuda:{number}" for number in range(len(visible))) or ("cpu",)
    gpus = sorted(
        int(path.name.removeprefix("nvidia"))
        for path in Path("/dev").glob("nvidia[0-9]*")
        if path.name.removeprefix("nvidia").isdigit()
    )
    return tuple(f"cuda:{number}" for number in range(len(gpus))) or ("cpu",)


def visible_gpus() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES; None if it is not set."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if listed is None else [each.strip() for each in listed.split(",") if each.strip()]


def device_environment(device: str) -> dict[str, str]:
    """Environment variables that make only this device visible to a process.

    Args:
        device: ``cpu``, or ``cuda:N`` for the N-th GPU that this process sees.

    Raises:
        ValueError: it is another kind of device, or a GPU that CUDA_VISIBLE_DEVICES hides.
    """
    kind, _, number = device.partition(":")
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    visible = visible_gpus()
    if kind == "cuda" and number.isdigit():
        if visible is None:
            return {"CUDA_VISIBLE_DEVICES": number}
        if int(number) < len(visible):
            return {"CUDA_VISIBLE_DEVICES": visible[int(number)]}
        raise ValueError(
            f"there is no device {device!r} for jobs: CUDA_VISIBLE_DEVICES lists {len(visible)}, numbered from 0"
        )
    raise ValueError(f"{device!r} is not a device for jobs: use 'auto' alone, 'cpu', or 'cuda:N' such as 'cuda:0'")
