"""SANA-Sprint's hybrid of continuous-time consistency and latent adversarial distillation.

Chen et al. 2025, https://arxiv.org/abs/2503.09641, section 3.3. Consistency ties the student to the teacher's
trajectories, but its images blur where one step cannot follow them; the adversarial loss sharpens them. Each is a
method of its own (`distillers.methods.scm`, `distillers.methods.ladd`), and the gradients of both losses meet in one
student update:

    student   L_sCM + adversarial_weight * (-mean D(x_t | c)),    x = G(starting state)
    heads     hinge loss on x, real images y and mismatched ones    `distillers.adversary`

x is generated from pure noise with probability ``noise_share`` ("max-time weighting"), otherwise from y noised to the
time of a later step, so that one student serves 1 to 4 steps ("step-adaptive").

Departures are those of the two methods. In the paper, one batch of states at sCM's times serves both losses; here the
adversarial loss uses states of the student's own schedules, which are those seen at inference. RAdam, as in sCM,
replaces CAME, which has no implementation in torch, and the trainer's ``gradient_clip`` is 10 unless a job sets
SANA-Sprint's 0.1. The guidance scale is fixed at the middle one of the three that SANA-Sprint embeds;
``guidance_range = [4, 5]`` embeds it. The public code draws tan t = e^n / 0.5 with n ~ N(0.2, 1.6^2), so that
ln(sigma / alpha) has the mean 0.2 + ln 2.
"""

import torch
from pydantic import Field
from torch import Tensor

from distillers.adversary import Adversary
from distillers.adversary_settings import AdversaryConfig
from distillers.methods.base import Setup, Step, Trained, Turn, TurnLoss
from distillers.methods.ladd import starting_states
from distillers.methods.scm import SCM, SCMConfig
from distillers.rollout import draw_noise
from weights.denoiser import Cond


class HybridConfig(AdversaryConfig, SCMConfig):
    """Settings of the hybrid: those of sCM and of the discriminator, with SANA-Sprint's defaults."""

    lr: float = Field(2e-6, gt=0, description="the student's learning rate")
    time_mean: float = Field(0.9, description="mean of ln(sigma / alpha) at sCM's training times")
    time_std: float = Field(1.6, gt=0, description="its standard deviation")
    tangent_warmup: int = Field(4000, ge=0, description="iterations over which r, the share of the tangent, rises to 1")
    adversarial_weight: float = Field(0.5, gt=0, description="weight of the adversarial loss, relative to sCM's")
    noise_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="probability that the discriminator's images start from pure noise, at a first time",
    )


class Hybrid(SCM):
    """See the module docstring."""

    name = "hybrid"
    Config = HybridConfig
    config: HybridConfig

    def __init__(self, config: HybridConfig, setup: Setup) -> None:
        super().__init__(config, setup)
        self.adversary = Adversary(config, setup)

    def trained(self) -> dict[str, Trained]:
        return {**super().trained(), "heads": self.adversary.trained(self.config.weight_decay, self.config.warmup)}

    def turns(self, iteration: int) -> list[Turn]:
        return [*super().turns(iteration), Turn(name="critic", trains=("heads",))]

    def loss(self, turn: Turn, step: Step) -> TurnLoss:
        real, cond = step.batch.pictures
        if turn.name == "critic":
            if "samples" not in step.scratch:
                with torch.no_grad():
                    step.scratch["samples"] = self._sample(real, cond, step)
            return self.adversary.critic_loss(step.scratch["samples"], cond, real, cond, step.local)
        followed = self.consistency_loss(step)
        x = self._sample(real, cond, step)  # the discriminator is given no scale: it judges by the prompt
        step.scratch["samples"] = x.detach()
        adversarial = self.adversary.student_loss(x, cond, step.local)
        metrics = {
            **followed.metrics,
            "student/consistency": followed.loss.detach(),
            "student/adversarial": adversarial.detach(),
            "student/std": x.detach().std(),
        }
        return TurnLoss(loss=followed.loss + self.config.adversarial_weight * adversarial, metrics=metrics)

    def _sample(self, real: Tensor, cond: Cond, step: Step) -> Tensor:
        """The student's images ``(B, ...)`` that the discriminator judges."""
        noise = draw_noise(tuple(real.shape), step.local, real.device)
        student, schedules = self.student.denoiser, list(self.config.schedules.values())
        x_t, t = starting_states(real, noise, student.schedule, schedules, self.config.noise_share, step.local)
        return student(x_t, t, self._told(cond, step))
