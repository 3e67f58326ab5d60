"""Consistency distillation along the guided teacher's trajectories, as in LCM.

Latent Consistency Models (Luo et al. 2023, https://arxiv.org/abs/2310.04378); consistency distillation (Song et al.
2023, https://arxiv.org/abs/2303.01469).

A consistency function maps every state on a trajectory of the probability-flow ODE to the same image. On a grid of
``solver_steps`` times, t_n = n / solver_steps, the guided teacher takes one DDIM step down the trajectory, and the
student's predictions before and after that step are trained to agree:

    x_t = alpha_t x + sigma_t eps,  t = t_n             x a real image, n uniform in skip..solver_steps
    x_s = DDIM(x_t, D_T(x_t, t; w), t -> s),  s = t_{n - skip}
    loss = d(f(x_t, t), sg f^-(x_s, s)),  f^-(x_0, 0) = x_0           d the pseudo-Huber of `regression_loss`

f is the student's x_0 estimate and f^- that of its moving average (``target_decay``; at 0 the student itself, as in
LCM-LoRA). The boundary condition f(x, 0) = x rules out the trivial solution, a constant.

Departures from the public code: it enforces the boundary condition with ``f = c_skip x_t + c_out D``, where c_skip =
0.25 / ((10 n)^2 + 0.25) at native timestep n is below 1e-5 at every timestep of its grid. Here the state itself is the
target at s = 0, and f = D, which is what every sampler assumes of a student.

The guidance scale is fixed, as in LCM-LoRA, or drawn for each image from ``guidance_range`` and given to the student as
a condition, as in LCM (see `SelfTaught`).
"""

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distillers.losses.regression import regression_loss
from distillers.methods.base import Step, Turn, TurnLoss
from distillers.methods.few_step import SelfTaught, SelfTaughtConfig
from distillers.rollout import draw_noise
from weights.denoiser import Cond
from weights.diffusion.samplers import ddim_step
from weights.diffusion.schedules import add_noise, expand


class ConsistencyConfig(SelfTaughtConfig):
    """Settings of consistency distillation. Defaults are LCM's for SD1.5, except that the guidance scale is fixed."""

    solver_steps: int = Field(50, ge=1, le=1000, description="DDIM steps that divide the teacher's trajectory")
    skip: int = Field(
        1, ge=1, description="how many of these steps lie between the two states; of 50, 1 is 20 of 1000 timesteps"
    )
    guidance_scale: float = Field(
        7.5, ge=0, description="teacher's guidance w: uncond + w (cond - uncond); 1.0 turns it off"
    )
    huber: float = Field(1e-3, ge=0, description="pseudo-Huber constant; 0 gives the mean square")
    lr: float = Field(1e-6, gt=0, description="the student's learning rate")

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.skip > self.solver_steps:
            raise ValueError(f"skip: {self.skip} must be at most solver_steps, {self.solver_steps}")
        return self


class Consistency(SelfTaught):
    """See the module docstring."""

    name = "consistency"
    Config = ConsistencyConfig
    config: ConsistencyConfig

    @classmethod
    def needs_pictures(cls, config: ConsistencyConfig) -> str | None:
        return "consistency distillation follows the teacher from noised real images"

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        config, (real, plain) = self.config, step.batch.pictures
        cond = self._told(plain, step)
        index = torch.randint(config.skip, config.solver_steps + 1, (len(real),), generator=step.local).to(real.device)
        t, s = index / config.solver_steps, (index - config.skip) / config.solver_steps
        x_t, guided, x_s = self._solve(real, cond, t, s, step)
        with torch.no_grad():
            # At s = 0 the target is the DDIM step's image, not a prediction (computed for these rows, then discarded).
            later = self._answer(x_s, s.clamp_min(1 / config.solver_steps), cond)
            target = torch.where(expand(s, x_s) > 0, later, guided)
        loss = regression_loss(self.student.denoiser(x_t, t, cond), target, config.huber)
        with torch.no_grad():
            metrics = {
                "student/target_std": target.std(),
                "student/solver_gap": (target - guided).square().mean().sqrt(),
            }
        return TurnLoss(loss=loss, metrics=metrics)

    @torch.no_grad()
    def _solve(self, real: Tensor, cond: Cond, t: Tensor, s: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Returns real images noised to t, the guided teacher's x_0 estimate, and its DDIM step from t to s."""
        schedule = self.teacher.schedule
        x_t = add_noise(schedule, real, draw_noise(tuple(real.shape), step.local, real.device), t)
        guided = self._guided(self.teacher, x_t, t, cond)
        return x_t, guided, ddim_step(x_t, guided, t, s, schedule)
