"""ADD: adversarial diffusion distillation (Sauer et al. 2023, https://arxiv.org/abs/2311.17042), which made SDXL Turbo.

The student generates an image x in one step, from noise or from a noised image. It is trained to fool a discriminator
that sees decoded images through a pretrained image network (`distillers.adversary` with ``features``), and to agree
with the frozen, guided teacher's denoising of x noised again:

    student   adversarial_weight * (-mean D(x)) + distillation_weight * c(t) ||x - F_T(sg(x_t), t | c)||^2
              + anchor_weight * ||x - x_start||^2
    heads     hinge loss on x and real images

with ``x_t = alpha_t sg(x) + sigma_t eps`` and the paper's exponential weighting ``c(t) = alpha_t``. The adversarial
term makes images realistic; the distillation term keeps them aligned with their prompts.

The anchor is not in the paper and is off by default. It is for jobs that continue from a student (``start``): x_start
is that student's prediction for the same state. The starting student has learned diversity and prompt alignment by
other means, and the anchor preserves both while images become more realistic.

Departures from the paper: the distance is a mean over latents instead of a sum, so that the weight applies at any
resolution. Unlike the paper's, the discriminator is conditioned neither on the prompt nor on the image that was noised,
so that it can judge images of made-up prompts. R1 is approximate, and taken with respect to the latents. The heads are
LADD's, and are trained on the images of the student's turn. The paper starts each step from noised images
(``backward_simulation = false``, the default); DMD2's backward simulation starts from the states seen at inference, and
needs no images of the prompts.
"""

from collections.abc import Callable, Hashable
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distillers.adapters import copy_sharing_frozen
from distillers.backbones import BackboneName
from distillers.critics import guided_x0
from distillers.methods.base import Betas, Setup, Step, Turn, TurnLoss
from distillers.methods.few_step import RolledOut, RolledOutConfig
from distillers.methods.judged import Judged, JudgedConfig
from distillers.rollout import draw_noise, draw_times
from weights.denoiser import Cond, Denoiser
from weights.diffusion.schedules import add_noise, expand


class ADDConfig(JudgedConfig, RolledOutConfig):
    """Settings of ADD. The defaults are the paper's where it states them."""

    features: BackboneName | None = Field(
        "dinov2-small", description="pretrained image network that judges decoded images, without noise"
    )
    prompted: bool = Field(False, description="condition the discriminator on the prompt; only without 'features'")
    mismatched_share: float = Field(
        0.0, ge=0, lt=1, description="share of the fakes that are real images with another's prompt; 0 turns it off"
    )
    adversarial_weight: float = Field(1.0, gt=0, description="weight of the adversarial loss")
    distillation_weight: float = Field(
        2.5, ge=0, description="weight of the mean squared distance to the teacher's estimate; 0 turns it off"
    )
    anchor_weight: float = Field(
        0.0, ge=0, description="weight of the squared distance to the starting student's predictions; 0 turns it off"
    )
    distillation_times: tuple[float, float] = Field(
        (0.001, 1.0), description="range of the times to which the student's images are noised for the teacher, uniform"
    )
    backward_simulation: bool = Field(
        False, description="train step k on the student's own steps 0..k-1; if false, on noised real images"
    )
    student_every: int = Field(1, ge=1, description="updates of the heads per update of the student")
    student_lr: float = Field(1e-5, gt=0, description="the student's learning rate")
    student_betas: Betas = Field((0.0, 0.99), description="AdamW's betas for the student")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay of student and heads")
    warmup: int = Field(100, ge=0, description="updates over which each network's learning rate rises to its value")

    @model_validator(mode="after")
    def _looks_at_noised_pictures(self) -> Self:
        low, high = self.distillation_times
        if not 0.001 <= low <= high <= 1:
            raise ValueError(f"distillation_times: {(low, high)} must be (low, high) with 0.001 <= low <= high <= 1")
        return self


class ADD(Judged, RolledOut):
    """See the module docstring."""

    name = "add"
    Config = ADDConfig
    config: ADDConfig

    def __init__(self, config: ADDConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.anchor: Denoiser | None = None
        if config.anchor_weight > 0:
            start = self.student.with_network(copy_sharing_frozen(self.student.network))
            start.network.requires_grad_(False).eval()
            self.anchor = start.denoiser

    @classmethod
    def needs_pictures(cls, config: ADDConfig) -> str | None:
        return "the discriminator compares with real images"

    @classmethod
    def needs_eager(cls, config: ADDConfig) -> str | None:
        if config.mismatched_share > 0:
            return f"mismatched_share {config.mismatched_share} counts the rows that differ; set it to 0"
        return None

    def branch(self, iteration: int, shared: Callable[[Turn], torch.Generator]) -> Hashable:
        turn = self.turns(iteration)[0]
        return (turn.name, self._way(*self._draw_step(shared(turn))))

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        if turn.name == "student":
            return self._student_loss(step)
        if "samples" not in step.scratch:
            with torch.no_grad():
                step.scratch["samples"] = self._sample(step)
        x, cond = step.scratch["samples"]
        real, real_cond = step.batch.pictures
        return self.adversary.critic_loss(x, cond, real, real_cond, step.local)

    def _student_loss(self, step: Step) -> TurnLoss:
        config = self.config
        x, cond, started, told = self._sampled(step)
        step.scratch["samples"] = (x.detach(), cond)
        adversarial = self.adversary.student_loss(x, cond, step.local)
        loss = config.adversarial_weight * adversarial
        metrics = {"student/adversarial": adversarial, "student/mean": x.mean(), "student/std": x.std()}
        if config.distillation_weight > 0:
            distillation = self._distillation(x, cond, step)
            loss = loss + config.distillation_weight * distillation
            metrics["student/distillation"] = distillation
        if self.anchor is not None:
            with torch.no_grad():
                before = self.anchor(started, told, cond)
            moved = (x - before).square().mean()
            loss = loss + config.anchor_weight * moved
            metrics["student/moved"] = moved
        return TurnLoss(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})

    def _distillation(self, x: Tensor, cond: Cond, step: Step) -> Tensor:
        """``mean alpha_t (x - F_T(x_t))^2``; x_t and the teacher's estimate carry no gradient."""
        config, schedule = self.config, self.teacher.schedule
        t = draw_times(step.size, config.distillation_times, step.local, x.device)
        with torch.no_grad():
            x_t = add_noise(schedule, x, draw_noise(tuple(x.shape), step.local, x.device), t)
            target = guided_x0(self.teacher, x_t, t, cond, self.setup.uncond, config.guidance_scale, None)
        return (expand(schedule.alpha(t), x).to(x.dtype) * (x - target).square()).mean()
