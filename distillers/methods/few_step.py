"""What methods share whose student draws in few steps: its schedules and its guidance, and, where nothing else is trained,
its optimizer."""

from typing import ClassVar, Self

from pydantic import Field, model_validator

from distillers.methods.base import Betas, Method, MethodConfig, OptimizerKind, OptimizerSettings, Setup, Trained, Turn
from weights.contracts import GuidanceConvention, StepSchedule
from weights.families.base import TextToImage


def default_schedules() -> dict[int, StepSchedule]:
    """1, 2 and 4 steps: native timesteps 999; 999, 499; 999, 749, 499, 249 of 1000."""
    return {
        1: StepSchedule(timesteps=[1.0]),
        2: StepSchedule(timesteps=[1.0, 0.5]),
        4: StepSchedule(timesteps=[1.0, 0.75, 0.5, 0.25]),
    }


class FewStepConfig(MethodConfig):
    """Of a method whose student draws in few steps."""

    schedules: dict[int, StepSchedule] = Field(
        default_factory=default_schedules, min_length=1, description="step counts to be good at, and their times"
    )
    guidance_scale: float = Field(1.0, ge=0, description="teacher's guidance w: uncond + w (cond - uncond); 1.0 is off")

    @model_validator(mode="after")
    def _schedules_have_their_length(self) -> Self:
        for steps, schedule in self.schedules.items():
            if len(schedule.timesteps) != steps:
                raise ValueError(f"schedules: {steps} has {len(schedule.timesteps)} timesteps, want {steps}")
        return self


class FewStepMethod(Method):
    """One student, taught by the guided teacher, that draws as its settings' schedules say."""

    config: FewStepConfig

    def __init__(self, config: FewStepConfig, setup: Setup) -> None:
        """See `Method`; makes the student."""
        self.config, self.setup = config, setup
        self._student = setup.new_student()
        self.teacher = setup.teacher

    @property
    def student(self) -> TextToImage:
        return self._student

    def schedules(self) -> dict[int, StepSchedule]:
        return dict(self.config.schedules)

    def guidance(self) -> GuidanceConvention:
        return GuidanceConvention(trained_scale=self.config.guidance_scale, default_scale=1.0)


class LoneStudentConfig(FewStepConfig):
    """Of a method that trains the student alone, or beside helpers with settings of their own."""

    lr: float = Field(1e-4, gt=0, description="student's learning rate")
    betas: Betas = Field((0.9, 0.999), description="the optimizer's betas")
    weight_decay: float = Field(0.0, ge=0, description="the optimizer's weight decay of the student")
    warmup: int = Field(0, ge=0, description="updates over which the student's learning rate rises")


class LoneStudent(FewStepMethod):
    """One turn an iteration, in which the student learns."""

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
