"""Records of the leaderboard on disk: the settings of a board, and each method's training and figures, as JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from distillers.evaluation.metrics import Estimate
from weights.files import write_atomically

UNTRAINED = "untrained"
"""Name of the control: the teacher's own weights, sampled like a student."""
OFF = 0.1
"""Tolerated relative deviation from the budget. Beyond it, training is repeated once; if still beyond, it is marked."""

Figure = Annotated[
    Estimate,
    BeforeValidator(lambda value: value if isinstance(value, Estimate) else Estimate(value[0], tuple(value[1]))),
    PlainSerializer(lambda estimate: [estimate.value, list(estimate.leave_one_out)], return_type=list),
]
"""An estimate with the values behind its error, ``[value, leave-one-out]``, so that ratios have errors too."""


class Record(BaseModel):
    """Base class of records: unknown fields are rejected, and instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    def write(self, path: Path) -> Self:
        """Writes the record to ``path`` atomically; returns it."""
        write_atomically(path, self.model_dump_json(indent=1) + "\n")
        return self


Kind = TypeVar("Kind", bound=Record)


def read(kind: type[Kind], path: Path) -> Kind | None:
    """Reads the record in ``path``; None if there is no such file.

    Raises:
        ValueError: the file is not a record of this kind.
    """
    if not path.is_file():
        return None
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a {kind.__name__.lower()} file of this version; delete it: {error}") from error


class Settings(Record):
    """What all rows of a board have in common; figures under different settings are not comparable."""

    minutes: float = Field(gt=0, description="training budget of each method, on each thread")
    by: Literal["processor", "clock"] = Field(description="how these minutes are measured")
    threads: int = Field(ge=1, description="CPU threads of training")
    seed: int = Field(ge=0, description="seed of every training")
    base: str = Field(description="the teacher")
    base_sha256: str
    protocol: str = Field(description="digest of the evaluation's protocol")
    quick: bool
    batch: int = Field(ge=1, description="images generated at a time when measuring, which affects rounding")


class Probe(Record):
    """The cost of a method, measured before its training, and the resulting number of iterations."""

    recipe_sha256: str = Field(description="digest of the recipe as it was then")
    seconds_per_iteration: float = Field(description="measured as the budget is")
    preparation_seconds: float = Field(description="likewise, before the first iteration, such as making teacher pairs")
    iterations: int
    corrected: bool = Field(False, description="true if measured in a whole training that missed the budget")


class Training(Record):
    """What a training took."""

    iterations: int
    seconds: float = Field(
        description="measured as the budget is, with preparation but without checkpoints and sample sheets"
    )
    clock_seconds: float = Field(description="the same by the clock")
    pictures: int = Field(description="images per iteration: batch size times accumulation")
    peak_bytes: int = Field(description="largest resident memory of the process")
    attempts: int = Field(description="processes that it took: more than one where it was stopped and resumed")


class Row(Record):
    """The scores of one model at one number of steps."""

    steps: int
    evaluations: int = Field(description="network evaluations per image")
    milliseconds: float = Field(description="per image, in batches")
    kernel_distance: Figure
    captions_apart: bool = Field(False, description="kernel distance leaves out pairs of images for the same caption")
    frechet_distance: float
    r_precision: Figure
    diversity: Figure | None = Field(description="mean pairwise distance over coarse prompts; None: not measured")


def row_at(rows: Sequence[Row], steps: int) -> Row | None:
    """The row at this number of steps, if there is one."""
    return next((row for row in rows if row.steps == steps), None)


class Machine(Record):
    """Where and when something was measured."""

    processor: str
    cores: str
    threads: str
    torch: str
    finished: str


class Teacher(Record):
    """The teacher's rows, its full step count first, and the scores of real images."""

    name: str
    guidance: float
    rows: list[Row]
    untrained: list[Row] = Field(description="its own weights, sampled as a student's by default")
    floor_kernel_distance: Figure
    real_r_precision: Figure
    machine: Machine

    @property
    def full(self) -> Row:
        """The row at the teacher's full step count, which others are compared with."""
        return self.rows[0]

    def at(self, steps: int) -> Row | None:
        return row_at(self.rows, steps)


class Result(Record):
    """A method on the board: trained and measured, or failed."""

    name: str
    method: str
    student: str
    recipe_sha256: str
    training: Training | None = None
    rows: list[Row] = []
    control: list[Row] = Field(
        [],
        description="the teacher's own weights, sampled as the student is; empty in records of before it was measured",
    )
    failure: str | None = Field(None, description="why it could not be trained")
    machine: Machine

    def at(self, steps: int) -> Row | None:
        return row_at(self.rows, steps)


class Kept(Record):
    """A whole board, kept beside its document, so that single methods can be repeated without the others."""

    settings: Settings
    teacher: Teacher
    results: list[Result]
