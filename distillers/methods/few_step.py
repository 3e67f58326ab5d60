"""Base classes of methods with a few-step student: schedules and guidance, rollouts, optimizers and target averages."""

from collections.abc import Hashable
from typing import ClassVar, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distillers.adapters import copy_sharing_frozen
from distillers.critics import guided_x0
from distillers.methods.base import (
    Betas,
    Method,
    MethodConfig,
    OptimizerKind,
    OptimizerSettings,
    Setup,
    Step,
    Trained,
    Turn,
)
from distillers.rollout import at_time, draw_noise, draw_step, evaluating, noised_real, simulate
from weights.contracts import GuidanceConvention, StepSchedule
from weights.denoiser import GUIDANCE, Cond, Denoiser
from weights.families.base import TextToImage


def default_schedules() -> dict[int, StepSchedule]:
    """1, 2 and 4 steps: native timesteps 999; 999, 499; 999, 749, 499, 249 of 1000."""
    return {
        1: StepSchedule(timesteps=[1.0]),
        2: StepSchedule(timesteps=[1.0, 0.5]),
        4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25]),
    }


class FewStepConfig(MethodConfig):
    """Settings of a method with a few-step student."""

    schedules: dict[int, StepSchedule] = Field(
        default_factory=default_schedules, min_length=1, description="step counts to train for, and their times"
    )
    guidance_scale: float = Field(
        1.0, ge=0, description="teacher's guidance w: uncond + w (cond - uncond); 1.0 turns it off"
    )

    @model_validator(mode="after")
    def _schedules_have_their_length(self) -> Self:
        for steps, schedule in self.schedules.items():
            if len(schedule.timesteps) != steps:
                raise ValueError(f"schedules: {steps} has {len(schedule.timesteps)} timesteps; give {steps}")
        return self


def check_told_times(schedules: dict[int, StepSchedule]) -> None:
    """Refuses conditioning times of their own, for methods that train the network at the times of its states alone.

    Raises:
        ValueError: a schedule has times that the student would never have been trained at.
    """
    for steps, schedule in schedules.items():
        if schedule.network_times != schedule.timesteps:
            raise ValueError(
                f"schedules: {steps} has conditioning {schedule.conditioning}, but this method tells the student the times "
                f"of its states, {schedule.timesteps}: leave conditioning out"
            )


class FewStepMethod(Method):
    """A method that distils the guided teacher into one student, which is sampled with the configured schedules."""

    config: FewStepConfig

    def __init__(self, config: FewStepConfig, setup: Setup) -> None:
        """Creates the student; see `Method` for the arguments."""
        self.config, self.setup = config, setup
        self._student = self._new_student()
        self.teacher = setup.teacher

    def _new_student(self) -> TextToImage:
        """The initial student."""
        return self.setup.new_student()

    @property
    def student(self) -> TextToImage:
        return self._student

    def schedules(self) -> dict[int, StepSchedule]:
        return dict(self.config.schedules)

    def guidance(self) -> GuidanceConvention:
        return GuidanceConvention(trained_scale=self.config.guidance_scale, default_scale=1.0)


class RolledOutConfig(FewStepConfig):
    """Settings of a method whose losses apply to the student's images, at one step of one step count at a time."""

    step_weights: dict[int, float] | None = Field(
        None, description="relative frequency of training for each step count; equal if left out"
    )
    backward_simulation: bool = Field(
        True, description="train step k on the student's own steps 0..k-1; if false, on noised real images"
    )

    @model_validator(mode="after")
    def _weighs_what_there_is(self) -> Self:
        weights = self.step_weights
        if weights is not None and (
            set(weights) - set(self.schedules) or min(weights.values(), default=0) < 0 or not sum(weights.values())
        ):
            raise ValueError(
                f"step_weights: {weights} must be at least 0, not all 0, and only for {sorted(self.schedules)}"
            )
        return self

    @property
    def starts_from_pictures(self) -> bool:
        """Whether a step of some schedule starts from noised real images."""
        return not self.backward_simulation and max(self.schedules) > 1


class Sampled(NamedTuple):
    """The student's images after one step, and that step's inputs."""

    x: Tensor
    """Images ``(B, ...)``, with a graph through that step only."""
    cond: Cond
    """Their conditions."""
    x_t: Tensor
    """The states that the step denoises, ``(B, ...)``."""
    t: Tensor
    """The times that the network is conditioned on, ``(B,)``."""


class RolledOut(FewStepMethod):
    """Draws a step count and one of its steps, and generates the student's images at that step."""

    config: RolledOutConfig

    def _draw_step(self, shared: torch.Generator) -> tuple[StepSchedule, int]:
        return draw_step(self.config.schedules, self.config.step_weights, shared)

    @staticmethod
    def _way(schedule: StepSchedule, k: int) -> Hashable:
        """All that `_sample` depends on: schedules that begin with the same times share their first step."""
        times, told = schedule.timesteps[: k + 1], schedule.network_times[: k + 1]
        return (*times, *told, schedule.sampler, schedule.eta) if k else (*times, *told)

    def _sample(self, step: Step) -> tuple[Tensor, Cond]:
        """The student's images ``(B, ...)`` at a drawn step, with a graph through that step, and their conditions."""
        return self._sampled(step)[:2]

    def _sampled(self, step: Step) -> Sampled:
        """Like `_sample`, with the inputs of the step."""
        schedule, k = self._draw_step(step.shared)
        denoiser, batch = self.student.denoiser, step.batch
        noise = draw_noise((step.size, *self.setup.latent_shape), step.local, self.setup.device)
        cond = batch.cond
        if self.config.backward_simulation or len(schedule.timesteps) == 1:
            x_t = simulate(denoiser, noise, schedule, k, cond, step.local)
        else:
            real, cond = batch.pictures
            x_t = noised_real(denoiser, real, noise, schedule, k)
        t = at_time(schedule.network_times[k], x_t)
        return Sampled(denoiser(x_t, t, cond), cond, x_t, t)


class LoneStudentConfig(FewStepConfig):
    """Settings of a method that trains only the student, or helper networks with settings of their own beside it."""

    lr: float = Field(1e-4, gt=0, description="the student's learning rate")
    betas: Betas = Field((0.9, 0.999), description="the optimizer's betas")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of the student")
    warmup: int = Field(0, ge=0, description="updates over which the student's learning rate rises to its value")


class LoneStudent(FewStepMethod):
    """A method with one turn per iteration, which updates the student."""

    config: LoneStudentConfig
    optimizer: ClassVar[OptimizerKind] = "adamw"

    def trained(self) -> dict[str, Trained]:
        config = self.config
        settings = OptimizerSettings(
            kind=self.optimizer,
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            warmup=config.warmup,
        )
        return {"student": Trained(module=self.student.network, optimizer=settings, average=True)}

    def turns(self, iteration: int) -> list[Turn]:
        return [Turn(name="student", trains=("student",))]


class SelfTaughtConfig(LoneStudentConfig):
    """Settings of a method whose student learns from its own predictions at a cleaner state."""

    guidance_range: tuple[float, float] | None = Field(
        None,
        description="(low, high) of the uniformly drawn guidance scales that the student is conditioned on (LCM's paper: "
        "6, 16 in this convention; SANA-Sprint: 4, 5); guidance_scale is then the default for requests",
    )
    target_decay: float = Field(
        0.95, ge=0, lt=1, description="decay of the target's moving average; 0: the student is its own target"
    )

    @model_validator(mode="after")
    def _is_told_the_times_of_its_states(self) -> Self:
        check_told_times(self.schedules)
        return self

    @model_validator(mode="after")
    def _range_holds_the_default(self) -> Self:
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if not 0 <= low < high:
                raise ValueError(f"guidance_range: {self.guidance_range} must be (low, high) with 0 <= low < high")
            if not low <= self.guidance_scale <= high:
                raise ValueError(f"guidance_scale: {self.guidance_scale} must lie in guidance_range, {low} to {high}")
        return self


class SelfTaught(LoneStudent):
    """A student that learns from its own predictions at a cleaner state, or from those of its moving average.

    The teacher's guidance scale is fixed, or drawn for each image from ``guidance_range`` and given to the student as a
    condition (LCM, https://arxiv.org/abs/2310.04378, section 4.3). One student then covers the whole range, at one
    evaluation per step. The guidance embedding layer starts at zero (LCM's starts at random), so that the student starts
    out as the teacher.
    """

    config: SelfTaughtConfig

    def __init__(self, config: SelfTaughtConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.average: TextToImage | None = None
        if config.target_decay > 0:
            self.average = self._student.with_network(copy_sharing_frozen(self._student.network))
            self.average.network.requires_grad_(False)

    def _new_student(self) -> TextToImage:
        student = super()._new_student()
        if self.config.guidance_range is None:
            return student
        try:
            return student.with_guidance_embedding()
        except TypeError as error:
            raise ValueError(f"config.guidance_range: {error}; leave it out, and set guidance_scale") from error

    @classmethod
    def needs_whole_network(cls, config: SelfTaughtConfig) -> str | None:
        if config.guidance_range is not None:
            return f"guidance_range {config.guidance_range} adds a layer to the network, which adapters cannot contain"
        return None

    def guidance(self) -> GuidanceConvention:
        scale, embedded = self.config.guidance_scale, self.config.guidance_range
        default = 1.0 if embedded is None else scale
        return GuidanceConvention(trained_scale=scale, default_scale=default, embedded=embedded)

    def _told(self, cond: Cond, step: Step) -> Cond:
        """The student's conditions, with a guidance scale for each row if the student embeds guidance."""
        if self.config.guidance_range is None:
            return cond
        low, high = self.config.guidance_range
        drawn = low + (high - low) * torch.rand(step.size, generator=step.local)
        return {**cond, GUIDANCE: drawn.to(self.setup.device)}

    def _guided(self, teacher: Denoiser, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The teacher's x0 estimate ``(B, ...)``, guided by the scales in the student's conditions, or the fixed one."""
        plain = {name: value for name, value in cond.items() if name != GUIDANCE}
        scale = cond.get(GUIDANCE, self.config.guidance_scale)
        return guided_x0(teacher, x_t, t, plain, self.setup.uncond, scale)

    @property
    def target(self) -> Denoiser:
        """The denoiser whose predictions at the cleaner state are the target."""
        return (self.average or self._student).denoiser

    @torch.no_grad()
    def _answer(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The target's x0 estimate ``(B, ...)``, without dropout, which would be noise in it."""
        with evaluating(self.target):
            return self.target(x_t, t, cond)

    @torch.no_grad()
    def after_step(self, turn: Turn, iteration: int) -> None:
        pairs = self._averaged().values()
        if pairs and "student" in turn.trains:
            ours, theirs = zip(*pairs, strict=True)
            torch._foreach_lerp_(ours, theirs, 1 - self.config.target_decay)

    def _averaged(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The target's and the student's weights by name, without the frozen ones, which both share."""
        if self.average is None:
            return {}
        pairs = zip(self.average.network.named_parameters(), self._student.network.parameters(), strict=True)
        return {name: (ours, theirs) for (name, ours), theirs in pairs if ours is not theirs}

    def state(self) -> dict[str, Tensor]:
        return {f"target.{name}": ours for name, (ours, _) in self._averaged().items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(tensors[name])
