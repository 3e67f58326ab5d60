"""The engine's interface, as the routes see it. Nothing here depends on torch or HTTP."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL.Image import Image

from weights.contracts import Diversity

Kind = Literal["student", "base"]


@dataclass(frozen=True, kw_only=True)
class DiversityWish:
    """Asks for the base's first step. None leaves a value to the student's calibration."""

    base_steps: int | None = None
    base_guidance: float | None = None
    start: float | None = None
    skip: int | None = None
    """Without `until`, the student takes over at this step's own time, whatever the calibration says."""
    until: float | None = None
    unprompted: float | None = None


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """Asks for images of one prompt, one per seed. None leaves a value to the model's default."""

    prompt: str
    seeds: tuple[int, ...]
    model: str | None = None
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    diversity: DiversityWish | None = None
    size: tuple[int, int] | None = None
    """Width and height in pixels."""
    loras: tuple[tuple[str, float], ...] = ()
    """LoRA students of the model's base to merge into a copy of the model, each with its scale."""
    deterministic: bool = False
    """Give the same bits whatever else is being generated: each image gets calls of its own."""
    client: str = ""
    """Id of the client. The request queue is fair between clients."""
    seconds: float | None = None
    """Seconds that the client is willing to wait; None or more than the engine's own limit means that limit."""
    previews: int = 0
    """How many intermediate states of each image to show, spread evenly over its steps; at most all but the last."""
    exact_previews: bool = False
    """Decode previews with the real decoder, not with a cheap approximation of it."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What the model predicts for an image after one of its steps: its x_0, decoded."""

    image: Image
    index: int
    """Index of the image in the request."""
    seed: int
    step: int
    """Number of the step, from 1."""
    steps: int
    """Total steps of the image, including the base's."""


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """One step of an image, as it was carried out."""

    leg: Kind
    """Which network made it."""
    t: float
    """The time that the network was given, in (0, 1]; 1 is noise."""
    guidance_scale: float
    """1.0 is off."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One finished image, and how it was generated."""

    image: Image
    seed: int
    model: str
    steps: int
    """Steps of the schedule; ``diversity`` says how many of a student's are left to its base."""
    guidance_scale: float
    diversity: Diversity | None
    evaluations: int
    """Network evaluations for this image, including the base's; a guided step counts two."""
    seconds: float
    """Generation time of the whole request, without its time in the queue."""
    student: str | None = None
    """Which member of a routed student generated it; None if the model is not routed."""
    base: str | None = None
    """The model that the student was made from; None if the base itself generated it."""
    job: str | None = None
    """SHA-256 of the job that made the student (`DistillJob.sha256`), if its manifest has it."""
    flagged: bool = False
    """The safety checker flagged the image, which has been replaced by a black one."""
    index: int = 0
    """Index of the image in the request."""
    loras: tuple[tuple[str, float], ...] = ()
    """The LoRAs merged into the model."""
    path: tuple[StepTaken, ...] = ()
    """Every step, in order. The model's x_0 at the last one is the image."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """The work that an engine has to do, and the models that it holds."""

    pictures: int
    """Images admitted and not finished."""
    seconds: float
    """Predicted seconds until all of them are finished."""
    resident: Mapping[str, int]
    """Bytes of each model in memory; components shared with a base count for the base only."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that can generate images."""

    id: str
    kind: Kind
    family: str
    created: int
    """Seconds since the epoch; 0 if unknown."""
    steps: tuple[int, ...]
    """Step counts that a student was trained for; empty for a base."""
    max_steps: int
    """Any number of steps from 1 to this can be drawn."""
    default_steps: int
    default_guidance: float
    size: int | None
    """Side length in pixels; None until the student's base is loaded."""
    embeds_guidance: bool = False
    """Whether a base takes the guidance scale as an input, and so needs one evaluation a step at any scale."""
    base: str | None = None
    method: str | None = None
    diversity: Diversity | None = None
    students: tuple[str, ...] = ()
    """The members of a routed student; empty for other models."""
    alias_of: str | None = None
    """The model that ``id`` is an alias of; None if ``id`` is the model's own name."""
    licence: str = "unspecified"
    metrics: Mapping[str, Any] = field(default_factory=dict)


class EngineError(Exception):
    """Base class of the engine's refusals and failures; the message is for the client."""


class BadRequest(EngineError):
    """The request is not valid for this model.

    Attributes:
        param: the field to change.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Flagged(BadRequest):
    """The safety checker refused an image of this prompt."""


class UnknownModel(EngineError):
    """No model has this name."""


class Overloaded(EngineError):
    """Too much work is queued.

    Attributes:
        retry_after: seconds until there is likely to be room, at least 1.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReady(EngineError):
    """The engine is still loading, has failed, or is stopping."""


class TimedOut(EngineError):
    """The request took longer than its limit."""


class ModelBroken(EngineError):
    """The model's files cannot be loaded: they are altered, truncated, or made for another base."""


class Engine(Protocol):
    """An engine. The app calls `start` and `stop` once each."""

    @property
    def ready(self) -> bool:
        """Whether `generate` works now: the models are loaded and warmed up."""

    @property
    def failure(self) -> str | None:
        """Why the engine will never be ready again, for the operator; None while it works."""

    async def start(self) -> None:
        """Start loading; returns at once."""

    async def drain(self, seconds: float) -> None:
        """Refuse new requests from now on; return when all admitted ones are finished, or after ``seconds``."""

    async def stop(self) -> None:
        """Refuse all unfinished requests, and release the memory."""

    def load(self) -> Load:
        """The current work and the models in memory."""

    async def models(self) -> list[ModelInfo]:
        """All models that can generate images now, the bases first.

        Raises:
            EngineError: NotReady, or TimedOut if the store's disk does not respond.
        """

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        """Generate one image per seed, in order. Cancelling the call drops the request before the next model call.

        Raises:
            EngineError: one of its subclasses.
        """

    def stream(self, request: DrawRequest) -> AsyncIterator[Preview | Drawn]:
        """Like `generate`, but yields results as they become available: requested previews, and finished images.

        Images come in any order, each after its own previews. Closing the iterator drops the request.

        Raises:
            EngineError: one of its subclasses, during iteration.
        """
