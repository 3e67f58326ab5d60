"""LADD: latent adversarial diffusion distillation (Sauer et al. 2024, https://arxiv.org/abs/2403.12015).

The student G denoises real images y in one step, from a time t of its own schedules or from pure noise. The result
should pass for a real image with a discriminator made of the frozen teacher and small heads (`distillers.adversary`,
which documents the losses and its own departures):

    x = G(alpha_t y + sigma_t eps, t | c)         t is that of pure noise with probability ``noise_share``
    student's turn, then the heads'               hinge losses on x and y, noised again

There is no other loss: nothing follows the teacher's trajectories. In the paper, the images y are generated beforehand
by the guided teacher, since they match their prompts better than most data. ``pictures = "teacher"`` does the same, and
then prompts are enough; by default, y come from the data.

Departures: the paper draws t from four fixed times, pure noise rarely at first and mostly after a warm-up. Here the
share of pure noise is constant, SANA-Sprint's 0.5 (https://arxiv.org/abs/2503.09641, "max-time weighting"), and all
later steps of the student's schedules are equally likely. The discriminator's times are SANA-Sprint's as well: its
public code draws tan t = e^n / 0.5 with n ~ N(-0.6, 1), for latents scaled to a standard deviation of 0.5, so that
ln(sigma / alpha) has the mean ln 2 - 0.6, about 0.1. AdamW with beta1 = 0 replaces its CAME optimizer. The heads' turn
reuses the images of the student's turn in that iteration, where the public code generates new ones; this saves an
evaluation.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from distillers.methods.base import (
    Betas,
    Setup,
    Step,
    Turn,
    TurnLoss,
    Workspace,
)
from distillers.methods.judged import Judged, JudgedConfig
from distillers.pairs import TeacherPairs
from distillers.rollout import draw_noise
from weights.contracts import GuidanceConvention, StepSchedule
from weights.denoiser import Cond
from weights.diffusion.schedules import Schedule, add_noise, expand


class LADDConfig(JudgedConfig):
    """Settings of LADD. The defaults are SANA-Sprint's."""

    noise_share: float = Field(
        0.5, ge=0, le=1, description="probability that the student starts from pure noise, at a schedule's first time"
    )
    student_every: int = Field(1, ge=1, description="updates of the heads per update of the student")
    pictures: Literal["data", "teacher"] = Field(
        "data", description="the real images: the data's, or the teacher's, generated before the first iteration"
    )
    teacher_pictures: int = Field(10_000, ge=1, description="how many of the teacher's images to generate")
    teacher_steps: int = Field(50, ge=1, le=1000, description="the teacher's DDIM steps per image")
    guidance_scale: float = Field(5.0, ge=0, description="teacher's guidance w for its images; 1.0 turns it off")
    student_lr: float = Field(2e-6, gt=0, description="the student's learning rate")
    student_betas: Betas = Field((0.0, 0.999), description="AdamW's betas for the student")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay of student and heads")
    warmup: int = Field(0, ge=0, description="updates over which each network's learning rate rises to its value")


class LADD(Judged):
    """See the module docstring."""

    name = "ladd"
    Config = LADDConfig
    config: LADDConfig

    def __init__(self, config: LADDConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.pairs: TeacherPairs | None = None

    @classmethod
    def needs_pictures(cls, config: LADDConfig) -> str | None:
        if config.pictures == "data":
            return "pictures 'data' trains against the data's images; set it to 'teacher' to train on prompts alone"
        return None

    def guidance(self) -> GuidanceConvention:
        guided = self.config.guidance_scale if self.config.pictures == "teacher" else 1.0
        return GuidanceConvention(trained_scale=guided, default_scale=1.0)

    def prepare(self, workspace: Workspace) -> None:
        config = self.config
        if config.pictures == "teacher":
            self.pairs = TeacherPairs(workspace, self.setup, config.teacher_pictures)
            self.pairs.make(config.teacher_steps, config.guidance_scale)

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        if turn.name == "student":
            x, real, cond = self._sample(step)
            step.scratch["samples"] = (x.detach(), real, cond)
            loss = self.adversary.student_loss(x, cond, step.local)
            x = x.detach()
            metrics = {"student/adversarial": loss.detach(), "student/mean": x.mean(), "student/std": x.std()}
            return TurnLoss(loss=loss, metrics=metrics)
        if "samples" not in step.scratch:
            with torch.no_grad():
                step.scratch["samples"] = self._sample(step)
        x, real, cond = step.scratch["samples"]
        return self.adversary.critic_loss(x, cond, real, cond, step.local)

    def _sample(self, step: Step) -> tuple[Tensor, Tensor, Cond]:
        """The student's images, the real images that they started from, and the conditions of both."""
        real, cond = self._real(step)
        noise = draw_noise(tuple(real.shape), step.local, real.device)
        denoiser, config = self.student.denoiser, self.config
        x_t, t = starting_states(
            real, noise, denoiser.schedule, list(config.schedules.values()), config.noise_share, step.local
        )
        return denoiser(x_t, t, cond), real, cond

    def _real(self, step: Step) -> tuple[Tensor, Cond]:
        if self.pairs is not None:
            _, real, cond = self.pairs.draw(step.size, step.local)
            return real, cond
        return step.batch.pictures


def starting_states(
    real: Tensor,
    noise: Tensor,
    diffusion: Schedule,
    schedules: list[StepSchedule],
    noise_share: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """The states that the student denoises: in each row pure noise, or a real image noised to the time of a later step.

    Args:
        real: images ``(B, ...)``.
        noise: unit normal, ``(B, ...)``.
        diffusion: the student's noise schedule.
        schedules: the step schedules. All first steps are equally likely, and so are all later steps.
        noise_share: probability of a first step, which starts from pure noise as at inference; 1 if no schedule has
            later steps.
        generator: on the CPU.

    Returns:
        States ``(B, ...)``, and the times that the network is conditioned on, ``(B,)``.
    """
    steps = [list(zip(each.timesteps, each.network_times, strict=True)) for each in schedules]
    first = [each[0] for each in steps]
    later = [step for each in steps for step in each[1:]]
    starts = torch.rand(len(real), generator=generator) < (noise_share if later else 1.0)
    table = torch.tensor(first + later, dtype=torch.float64)
    at_first = torch.randint(len(first), (len(real),), generator=generator)
    at_later = len(first) + torch.randint(max(1, len(later)), (len(real),), generator=generator)
    t, told = table[torch.where(starts, at_first, at_later.clamp_max(len(table) - 1))].to(real.device).unbind(1)
    norm = expand(torch.hypot(diffusion.alpha(t), diffusion.sigma(t)), noise).float()  # `initial_state` for each row
    x_t = torch.where(expand(starts.to(real.device), real), norm * noise, add_noise(diffusion, real, noise, t.float()))
    return x_t, told.float()
