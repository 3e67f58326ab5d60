"""The events of a running job: what it writes, one JSON line each, and what a server and the trainer's own terminal read."""

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from weights.contracts import Contract, Name


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
