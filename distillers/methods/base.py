"""The interface between methods and the trainer: a method computes losses, the trainer does everything else.

A method declares the networks it trains and their optimizer settings (`Method.trained`), which of them are updated in
an iteration (`Method.turns`), and the loss of each turn (`Method.loss`). It owns no optimizer, never calls
``backward``, moves nothing between devices and reads no files, so the trainer provides gradient accumulation,
averaging, precision, checkpoints and resumption for every method. State beyond the trained networks (a target average,
running ratios) is returned by `Method.state`, and may be updated in `Method.after_step`.
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
    """Base class of every method's Config: frozen, rejects unknown fields; each field needs a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @property
    def least_iterations(self) -> int:
        """The shortest run that reaches the method's last phase; shorter runs are rejected."""
        return 1

    @property
    def teacher_scale(self) -> float:
        """The teacher's guidance scale, which a network that embeds guidance is told at every call in training."""
        return float(getattr(self, "guidance_scale", 1.0))

    def scaled(self, factor: float) -> Self:
        """These settings for a run of ``factor`` times as many iterations; phases keep their share of the run.

        At 0, every phase is as short as possible. Settings without phases are unchanged.
        """
        return self


def _check_betas(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"{betas} must lie in [0, 1)")
    return betas


Betas = Annotated[tuple[float, float], AfterValidator(_check_betas)]
"""Decay rates of an optimizer's two running means, each in [0, 1)."""


OptimizerKind = Literal["adamw", "muon", "radam"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How the trainer optimizes a network."""

    lr: float
    kind: OptimizerKind = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    eps: float = 1e-8
    warmup: int = 0
    """Updates of this network over which its learning rate rises linearly, starting at ``lr / warmup``."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network trained by a method."""

    module: nn.Module
    optimizer: OptimizerSettings
    average: bool = False
    """Keep an exponential moving average of the network. The student's average is sampled from and published."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One optimizer step within an iteration: one loss, and the networks it updates."""

    name: str
    trains: tuple[str, ...]
    lr: float | None = None
    """Learning rate that replaces the networks' own."""
    since: int = 0
    """Updates its networks made in an earlier phase. After these, the optimizers are reset and warm-up restarts."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The data of one forward pass; all tensors are on the training device."""

    cond: Cond
    """Conditions of the student's images, B rows."""
    real: Tensor | None = None
    """Latents of real images, ``(B, ...)`` float32, unit variance; None if the data has no images."""
    real_cond: Cond | None = None
    """Conditions of the real images; the same object as ``cond`` if both are drawn together."""

    @property
    def pictures(self) -> tuple[Tensor, Cond]:
        """The real images and their conditions, for configurations for which `Method.needs_pictures` gives a reason."""
        assert self.real is not None, "needs_pictures lets no such batch through"
        return self.real, self.real_cond or self.cond


@dataclass(frozen=True, kw_only=True)
class Step:
    """One micro-batch of one turn.

    ``shared`` draws the same numbers in every process (which step count to train); ``local`` differs between processes.
    Both are CPU generators seeded by (seed, iteration, micro-batch, turn), so that a resumed run draws the same
    numbers. In a captured iteration, ``local`` is the GPU's generator, seeded by the iteration. ``scratch`` belongs to
    the micro-batch and lives for one iteration: a turn can leave detached results in it for a later turn to reuse, such
    as the student's samples.
    """

    iteration: int
    micro: int
    batch: Batch
    shared: torch.Generator
    local: torch.Generator
    scratch: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The batch size B."""
        return len(next(iter(self.batch.cond.values())))


@dataclass(frozen=True, kw_only=True)
class TurnLoss:
    """The scalar to differentiate, and values to log (detached scalars)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Guide:
    """Settings of autoguidance; see `AutoGuided`."""

    model: TextToImage
    """A worse version of the teacher; its network is frozen."""
    scale: float


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a method is constructed from."""

    base: TextToImage
    """The teacher's family instance; its network is frozen."""
    uncond: Cond
    """Conditions of the empty prompt, 1 row."""
    latent_shape: tuple[int, ...]
    """Shape of one latent, without the batch dimension."""
    new_network: Callable[[bool], TextToImage]
    """A trainable copy of the teacher. ``new_network(True)`` trains only low-rank adapters if the job requests them;
    ``new_network(False)`` trains every weight. A network with adapters may share its frozen weights with the teacher
    (see `distillers.adapters`): copies must keep sharing them, and nothing may modify them."""
    new_student: Callable[[], TextToImage]
    """The initial student: ``new_network(True)``, or a trainable copy of the student that the job starts from."""
    device: torch.device
    guide: Guide | None = None
    """The worse model that the teacher is guided away from; None without autoguidance."""

    @property
    def teacher(self) -> Denoiser:
        """The base's denoiser, with autoguidance if the job requests it."""
        own, guide = self.base.denoiser, self.guide
        return own if guide is None else AutoGuided(own, guide.model.denoiser, guide.scale, self.uncond)


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """What `Method.prepare` may use: a folder that survives restarts, the data's conditions, and progress reporting."""

    folder: Path
    prompts: int
    """Number of prompts in the data."""
    conditions: Callable[[Tensor], Cond]
    """Conditions of the prompts at rows ``(B,)`` int64, on the training device. The function may be kept for later."""
    seed: Callable[..., int]
    """Derives a seed from the job's seed and the given words and numbers."""
    tick: Tick


class Method(ABC):
    """A distillation method. Subclasses defined in a module of this package are discovered by their ``name``."""

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]

    @abstractmethod
    def __init__(self, config: Any, setup: Setup) -> None:
        """Builds the networks.

        Args:
            config: an instance of this class's ``Config``.
            setup: the teacher and everything else to build from.
        """

    @classmethod
    def needs_pictures(cls, config: Any) -> str | None:
        """Why this configuration cannot train on prompts alone; None if it can."""
        return None

    @classmethod
    def needs_whole_network(cls, config: Any) -> str | None:
        """Why this configuration cannot train only adapters; None if it can."""
        return None

    @classmethod
    def needs_eager(cls, config: Any) -> str | None:
        """Why an iteration of this configuration cannot be captured as a CUDA graph; None if it can.

        It can if the losses neither synchronise with the GPU nor copy data to it, and draw from ``step.local`` on its
        own device.
        """
        return f"{cls.name}'s losses read numbers back from the GPU"

    @property
    @abstractmethod
    def student(self) -> TextToImage:
        """The student: the model that is averaged, sampled from and published."""

    @abstractmethod
    def trained(self) -> dict[str, Trained]:
        """The trained networks by name. ``"student"`` is always among them."""

    @abstractmethod
    def turns(self, iteration: int) -> list[Turn]:
        """The optimizer steps of an iteration (from 0), in order. Turns with the same name train the same networks."""

    @abstractmethod
    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        """The loss of a micro-batch. Only the turn's networks have ``requires_grad`` during the call."""

    @abstractmethod
    def schedules(self) -> dict[int, StepSchedule]:
        """The student's step schedules, by number of steps."""

    def guidance(self) -> GuidanceConvention:
        """The guidance scale distilled into the student, and the scale to generate with."""
        return GuidanceConvention()

    def prepare(self, workspace: Workspace) -> None:
        """Work before the first iteration, such as teacher pairs; must resume from what ``workspace.folder`` holds."""
        return None

    def after_step(self, turn: Turn, iteration: int) -> None:
        """Called after the turn's networks have been updated."""
        return None

    def branch(self, iteration: int, shared: Callable[[Turn], torch.Generator]) -> Hashable:
        """What the losses of an iteration decide from ``step.shared``.

        Iterations with equal turns and equal branches run the same kernels, so they can share a CUDA graph.

        Args:
            iteration: from 0.
            shared: returns a turn's ``step.shared`` in its initial state.
        """
        return None

    def state(self) -> dict[str, Tensor]:
        """Tensors that change during training but belong to no trained network; saved in checkpoints."""
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state` returned."""
        if tensors:
            raise ValueError(f"{self.name} keeps no state, but the checkpoint has {sorted(tensors)}")
