"""What the routes may ask of an engine, whatever draws inside: nothing here knows of torch or HTTP."""

from collections.abc import Mapping
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
    deterministic: bool = False
    """A picture is the same, bit for bit, whatever else is drawn with it: each is drawn in a batch of its own."""


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

    async def stop(self) -> None:
        """Finish the picture at hand, refuse what waits, and give the memory back."""

    def models(self) -> list[ModelInfo]:
        """All models that can be drawn with now, the bases first. Reads the disk."""

    async def generate(self, request: DrawRequest) -> list[Drawn]:
        """One picture per seed, in order. Cancelling the call drops the request, also from the queue.

        Raises:
            EngineError: one of its subclasses.
        """
