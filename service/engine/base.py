"""What the routes may ask of an engine, whatever draws inside: nothing here knows of torch or HTTP."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL.Image import Image

from weights.contracts import Diversity

Kind = Literal["student", "base"]


@dataclass(frozen=True, kw_only=True)
class DiversityWish:
    """The base's first step, please; None leaves a value to the student's calibration."""

    base_steps: int | None = None
    base_guidance: float | None = None
    unprompted: float | None = None


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """Pictures of one prompt, one per seed. None leaves a value to the model's default."""

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
    """LoRA students of the model's base to merge into a copy of it, and the scale of each."""
    deterministic: bool = False
    """A picture is the same, bit for bit, whatever else is drawn with it: each is drawn in a batch of its own."""
    client: str = ""
    """Whose request it is: the line is fair between clients."""
    seconds: float | None = None
    """How long the client waits at most; the engine's own limit when left out, or where that is shorter."""
    previews: int = 0
    """How many states of each picture to show before it is done, evenly spread over its steps; at most all but the last."""
    exact_previews: bool = False
    """Previews by the real decoder, not by a cheap approximation of it."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What the model sees in a picture after one of its steps: its x_0, decoded."""

    image: Image
    index: int
    """Which of the request's pictures."""
    seed: int
    step: int
    """From 1."""
    steps: int
    """Of the picture in all, the base leg's included."""


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """One step of a picture, as it was drawn."""

    leg: Kind
    """Whose network."""
    t: float
    """The time that the network was told, in (0, 1]; 1 is noise."""
    guidance_scale: float
    """1.0 is off."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One picture, and how it was drawn."""

    image: Image
    seed: int
    model: str
    steps: int
    """Steps of the schedule; the first of them are the base's when ``diversity`` is set."""
    guidance_scale: float
    diversity: Diversity | None
    evaluations: int
    """Network evaluations for this picture, the base leg's included; a guided step counts two."""
    seconds: float
    """Time of the whole request's drawing, without its wait."""
    student: str | None = None
    """Which of a routed student's students drew it; None where the model drew it itself."""
    base: str | None = None
    """The model that the student was made from; None where the base itself drew."""
    job: str | None = None
    """SHA-256 of the job that made the student (`DistillJob.sha256`), where its manifest tells."""
    flagged: bool = False
    """The safety checker flagged it, and the image is black."""
    index: int = 0
    """Which of the request's pictures."""
    loras: tuple[tuple[str, float], ...] = ()
    """What was merged into the model for it."""
    path: tuple[StepTaken, ...] = ()
    """Every step, the first one first; the model's x_0 at the last one is the picture."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine has to do, and holds."""

    pictures: int
    """Admitted and not done."""
    seconds: float
    """Predicted, until all of them are done."""
    resident: Mapping[str, int]
    """Bytes of each model in memory, shared components counted with the base alone."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """A model that can be drawn with."""

    id: str
    kind: Kind
    family: str
    created: int
    """Seconds since the epoch; 0 where nobody knows."""
    steps: tuple[int, ...]
    """Step counts that the model has a schedule for; empty: any from 1 to ``max_steps``."""
    max_steps: int
    default_steps: int
    default_guidance: float
    size: int | None
    """Pixels of a side; None until the student's base is loaded."""
    base: str | None = None
    method: str | None = None
    diversity: Diversity | None = None
    students: tuple[str, ...] = ()
    """The students that a routed one picks from; none where the model draws itself."""
    alias_of: str | None = None
    """The model that ``id`` is another name of; None where it is its own."""
    licence: str = "unspecified"
    metrics: Mapping[str, Any] = field(default_factory=dict)


class EngineError(Exception):
    """Base of all that an engine refuses or fails at; the message is for the client."""


class BadRequest(EngineError):
    """The request cannot be drawn as it is.

    Attributes:
        param: the field to change.
    """

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


class Flagged(BadRequest):
    """The safety checker refuses a picture of this prompt."""


class UnknownModel(EngineError):
    """No model has this name."""


class Overloaded(EngineError):
    """Too much is waiting.

    Attributes:
        retry_after: seconds until there is likely room, at least 1.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class NotReady(EngineError):
    """The engine still loads, has failed to, or stops."""


class TimedOut(EngineError):
    """The request took longer than it may."""


class ModelBroken(EngineError):
    """The model's files cannot be loaded: changed on the disk, cut off, or made for another base."""


class Engine(Protocol):
    """An engine. `start` and `stop` are called once each, by the app."""

    @property
    def ready(self) -> bool:
        """Whether `generate` draws now: the models are loaded and a first picture was drawn."""

    @property
    def failure(self) -> str | None:
        """Why the engine will never be ready again, for the operator; None while nothing is wrong."""

    async def start(self) -> None:
        """Begin loading; returns at once."""

    async def drain(self, seconds: float) -> None:
        """Refuse new requests from now on, and return when all that were admitted are done, or after so long."""

    async def stop(self) -> None:
        """Refuse all that is not done, and give the memory back."""

    def load(self) -> Load:
        """What there is to do now, and what is in memory."""

    async def models(self) -> list[ModelInfo]:
        """All models that can be drawn with now, the bases first.

        Raises:
            EngineError: NotReady, or TimedOut where the store's disk does not answer.
        """

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        """One picture per seed, in order. Cancelling the call drops the request by the next tick.

        Raises:
            EngineError: one of its subclasses.
        """

    def stream(self, request: DrawRequest) -> AsyncIterator[Preview | Drawn]:
        """The same, as things happen: previews where they are asked for, each picture as soon as it is done.

        The pictures come in any order, each after its own previews. Closing the iterator drops the request.

        Raises:
            EngineError: one of its subclasses, in iteration.
        """
