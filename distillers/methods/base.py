"""The seam between methods and the trainer: a method computes losses, the trainer does everything else.

A method says which networks it trains and with which optimizer settings (`Method.trained`), which of them step at an
iteration (`Method.turns`), and the loss of each turn (`Method.loss`). It owns no optimizer, calls no ``backward``, moves
nothing between devices and reads no files, so that every method gets accumulation, averages, precision, checkpoints and
resumption from the one trainer. What a method keeps beside its trained networks (a target average, running ratios) it
returns from `Method.state`, in `Method.after_step` it may change it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict
from torch import Tensor, nn

from distillers.processes import Tick
from weights.contracts import GuidanceConvention, StepSchedule
from weights.denoiser import Cond, Denoiser
from weights.diffusion.guidance import AutoGuided
from weights.families.base import TextToImage


class MethodConfig(BaseModel):
    """Base of every method's Config: keyword-only, frozen, unknown fields refused, each field described."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def least_iterations(self) -> int:
        """The shortest run that reaches the method's last phase; a shorter one is refused."""
        return 1

    def scaled(self, factor: float) -> Self:
        """These settings for a run of ``factor`` times as many iterations: phases told in iterations keep their share.

        At 0 every phase is as short as can be. What has no phases is the same at every length.
        """
        return self


def _check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{betas} must lie in [0, 1)")
    return betas


Betas = Annotated[tuple[float, float], AfterValidator(_check_betas)]
"""Of an optimizer's two running means, each in [0, 1)."""


OptimizerKind = Literal["adamw", "muon", "radam"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the trainer optimizes one network."""

    lr: float
    kind: OptimizerKind = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    warmup: int = 0
    """Updates of this network over which its learning rate rises linearly from ``lr / warmup``."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network that a method trains."""

    module: nn.Module
    optimizer: OptimizerSettings
    average: bool = False
    """Keep an exponential moving average of it; the student's is what is sampled from and published."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One optimizer step of an iteration: one loss, and the networks that step on it."""

    name: str
    trains: tuple[str, ...]
    lr: float | None = None
    """Learning rate in place of the networks' own."""
    since: int = 0
    """Updates of its networks in an earlier phase: after them optimizers start anew, and learning rates rise anew."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass works on; all tensors are on the training device."""

    cond: Cond
    """Conditions of the student's pictures, B rows."""
    real: Tensor | None = None
    """Latents of real pictures, ``(B, ...)`` float32, unit variance; None where the data has no pictures."""
    real_cond: Cond | None = None
    """Conditions of the real pictures; the same object as ``cond`` where both are drawn together."""

    @property
    def pictures(self) -> tuple[Tensor, Cond]:
        """The real pictures and their conditions, for configurations that `Method.needs_pictures` speaks for."""
        assert self.real is not None, "needs_pictures lets no such batch through"
        return self.real, self.real_cond or self.cond


@dataclass(frozen=True, kw_only=True)
class Step:
    """One micro-batch of one turn.

    ``shared`` gives the same numbers on every process (which step count to train), ``local`` gives each process its own.
    Both are CPU generators, seeded by (seed, iteration, micro-batch, turn), so that a resumed run draws the same numbers;
    in a captured iteration ``local`` is the GPU's own, seeded by the iteration.
    ``scratch`` belongs to the micro-batch and lives for one iteration: a turn may leave there, without a graph, what a
    later turn of the iteration can use again, such as the student's samples.
    """

    iteration: int
    micro: int
    batch: Batch
    shared: torch.Generator
    local: torch.Generator
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """B."""
        return len(next(iter(self.batch.cond.values())))


@dataclass(frozen=True, kw_only=True)
class TurnLoss:
    """The scalar to differentiate, and numbers for the log (detached scalars)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Guide:
    """Autoguidance: see `AutoGuided`."""

    model: TextToImage
    """A worse version of the teacher; its network is frozen."""
    scale: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a method is built from."""

    base: TextToImage
    """The teacher's family instance; its network is frozen."""
    uncond: Cond
    """Conditions of the empty prompt, 1 row."""
    latent_shape: tuple[int, ...]
    """Of one picture, without the batch."""
    new_network: Callable[[bool], TextToImage]
    """A trainable copy of the teacher: ``new_network(True)`` has low-rank adapters where the job asks for them, and
    trains those alone; ``new_network(False)`` trains every weight. A network with adapters may hold the teacher's own frozen
    weights (see `distillers.adapters`): whoever copies it keeps them shared, and nobody changes them."""
    new_student: Callable[[], TextToImage]
    """What the student is at first: ``new_network(True)``, or a trainable copy of the student that the job starts from."""
    device: torch.device
    guide: Guide | None = None
    """What the teacher is led away from; None where it is not."""

    @property
    def teacher(self) -> Denoiser:
        """The base's own denoiser, or that under autoguidance where the job asks for it."""
        own, guide = self.base.denoiser, self.guide
        return own if guide is None else AutoGuided(own, guide.model.denoiser, guide.scale, self.uncond)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What `Method.prepare` may use: a folder that survives restarts, the data's conditions, and a sign of life."""

    folder: Path
    prompts: int
    """How many prompts the data has."""
    conditions: Callable[[Tensor], Cond]
    """Conditions of the prompts with these rows, ``(B,)`` int64, on the training device. May be kept and called later."""
    seed: Callable[..., int]
    """A seed made from the job's seed and the words and numbers given."""
    tick: Tick


class Method(ABC):
    """One way to make a student. A subclass in a module of this package is found by its ``name``."""

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]

    @abstractmethod
    def __init__(self, config: Any, setup: Setup) -> None:
        """Builds the networks.

        Args:
            config: an instance of this class's ``Config``.
            setup: the teacher and what else there is to build from.
        """

    @classmethod
    def needs_pictures(cls, config: Any) -> str | None:
        """Why this configuration cannot train on prompts alone; None when it can."""
        return None

    @classmethod
    def needs_whole_network(cls, config: Any) -> str | None:
        """Why this configuration cannot train adapters alone; None when it can."""
        return None

    @classmethod
    def needs_eager(cls, config: Any) -> str | None:
        """Why an iteration of this configuration cannot be captured as a CUDA graph; None when it can.

        It can where the losses neither wait for the GPU nor take anything to it, and draw from ``step.local`` where it is.
        """
        return f"{cls.name}'s losses ask the GPU for numbers"

    @property
    @abstractmethod
    def student(self) -> TextToImage:
        """The student: what is averaged, sampled from and published."""

    @abstractmethod
    def trained(self) -> dict[str, Trained]:
        """The trained networks by name. ``"student"`` is always among them."""

    @abstractmethod
    def turns(self, iteration: int) -> list[Turn]:
        """The optimizer steps of an iteration (from 0), in order. A turn's name always trains the same networks."""

    @abstractmethod
    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        """The loss of a micro-batch. Only the turn's networks have ``requires_grad`` while it is computed."""

    @abstractmethod
    def schedules(self) -> dict[int, StepSchedule]:
        """How the student draws, by number of steps."""

    def guidance(self) -> GuidanceConvention:
        """The guidance baked into the student, and what to draw with."""
        return GuidanceConvention()

    def prepare(self, workspace: Workspace) -> None:
        """Work before the first iteration, such as teacher pairs; must resume from what ``workspace.folder`` holds."""
        return None

    def after_step(self, turn: Turn, iteration: int) -> None:
        """Called after a turn's networks stepped."""
        return None

    def branch(self, iteration: int, shared: Callable[[Turn], torch.Generator]) -> Hashable:
        """What an iteration's losses decide by ``step.shared``; iterations of equal turns and branches run the same kernels.

        Args:
            iteration: from 0.
            shared: a turn's ``step.shared``, as new.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors that change while training and belong to no trained network; saved in checkpoints."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Puts back what `state` returned."""
        if tensors:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint has {sorted(tensors)}")
