"""DMD2: Improved Distribution Matching Distillation (Yin et al. 2024, https://arxiv.org/abs/2405.14867).

Networks, turns and the adversarial loss are those of the family (`distillers.methods.score_distillation`, which follows
this paper). The loss between the scores is distribution matching (section 3, eq. 3): a student's image x moves along

    grad_x = (F_S(x_t) - F_T(x_t)) / mean|x - F_T(x_t)|

the gradient of the reverse KL divergence at t. SDXL's one-step student starts with a short regression on pairs of noise
and the image that the teacher generates from it (``regression_iterations``). Distribution matching then starts with a
new optimizer and a new warm-up, as in the public code, where it is a separate run from the regression's checkpoint.

As in the public code, the fake score's turn reuses the samples of the student's turn (``share_samples``). Optional
departures from it: the discriminator can see the same noised images as the score losses (``share_times``), which saves
a forward pass in both turns, and guidance can be restricted to an interval of times (``guidance_interval``). The public
code's regression loss is LPIPS on decoded images; here it is computed on latents (``regression_huber``), which needs no
other network.
"""

from dataclasses import replace
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from distillers.losses.distribution_matching import distribution_matching_gradient, gradient_as_loss
from distillers.losses.regression import regression_loss
from distillers.methods.base import Setup, Step, Turn, TurnLoss, Workspace
from distillers.methods.score_distillation import Noised, ScoreDistillation, detached
from distillers.methods.score_settings import ScoreDistillationConfig
from distillers.pairs import TeacherPairs
from distillers.rollout import at_time
from weights.diffusion.samplers import initial_state


class DMD2Config(ScoreDistillationConfig):
    """Settings of DMD2: those of the family, with DMD2's defaults, and those of the regression."""

    regression_iterations: int = Field(
        0, ge=0, description="iterations of regression on teacher pairs before DMD (SDXL one step: 2000 to 3000)"
    )
    regression_pairs: int = Field(10_000, ge=1, description="pairs of noise and teacher's image to generate for it")
    regression_steps: int = Field(50, ge=1, le=1000, description="the teacher's DDIM steps per pair")
    regression_lr: float = Field(1e-5, gt=0, description="the student's learning rate during the regression")
    regression_huber: float = Field(0.0, ge=0, description="pseudo-Huber constant; 0 gives the mean square")

    @property
    def least_iterations(self) -> int:
        return self.regression_iterations + 1

    def scaled(self, factor: float) -> Self:
        kept = max(1, round(factor * self.regression_iterations)) if self.regression_iterations else 0
        return self.model_copy(update={"regression_iterations": kept})

    @model_validator(mode="after")
    def _regression_has_its_schedule(self) -> Self:
        if self.regression_iterations and 1 not in self.schedules:
            raise ValueError("regression_iterations: the regression trains the one-step schedule: add 1 to schedules")
        return self


class DMD2(ScoreDistillation):
    """See the module docstring."""

    name = "dmd2"
    Config = DMD2Config
    config: DMD2Config

    def __init__(self, config: DMD2Config, setup: Setup) -> None:
        super().__init__(config, setup)
        self.pairs: TeacherPairs | None = None

    @classmethod
    def needs_eager(cls, config: Any) -> str | None:
        if config.regression_iterations:
            return f"regression_iterations {config.regression_iterations} reads its pairs from the disk; set it to 0"
        return super().needs_eager(config)

    def matching(self, seen: Noised) -> Tensor:
        gradient = distribution_matching_gradient(seen.x, seen.fake_x0, seen.teacher_x0, self.weight(seen))
        return gradient_as_loss(seen.x, gradient)

    def weight(self, seen: Noised) -> Tensor | None:
        """h(r) of each image, ``(B,)``; None for the reverse KL, where it is 1."""
        return None

    def turns(self, iteration: int) -> list[Turn]:
        done = iteration - self.config.regression_iterations
        if done < 0:
            return [Turn(name="regression", trains=("student",), lr=self.config.regression_lr)]
        return [
            replace(turn, since=iteration - done) if turn.name == "student" else turn for turn in super().turns(done)
        ]

    def prepare(self, workspace: Workspace) -> None:
        if self.config.regression_iterations:
            self.pairs = TeacherPairs(workspace, self.setup, self.config.regression_pairs)
            config = self.config
            self.pairs.make(config.regression_steps, config.guidance_scale, config.guidance_interval)

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        return self._regression_loss(step) if turn.name == "regression" else super().loss(turn, step)

    def _regression_loss(self, step: Step) -> TurnLoss:
        assert self.pairs is not None, "prepare makes the pairs before the first iteration"
        noise, target, cond = self.pairs.draw(step.size, step.local)
        schedule = self.config.schedules[1]
        x_t = initial_state(noise, self.teacher.schedule, schedule.timesteps[0])
        x0 = self.student.denoiser(x_t, at_time(schedule.network_times[0], x_t), cond)
        loss = regression_loss(x0, target, self.config.regression_huber)
        return TurnLoss(loss=loss, metrics=detached({"regression/loss": loss}))
