"""SANA-Sprint's hybrid: continuous-time consistency with a latent adversary (Chen et al. 2025,
https://arxiv.org/abs/2503.09641, section 3.3).

Consistency ties the student to the teacher's trajectories, whose pictures blur where one step cannot follow them; the
adversary sharpens what it draws. Each is a method of its own here (`distillers.methods.scm`, `distillers.methods.ladd`),
and both losses' gradients meet in one turn of the student:

    student   L_sCM + adversarial_weight * (-mean D(x_t | c)),    x = G(starting state)
    heads     hinge, on x, real pictures y and mismatched ones     `distillers.adversary`

x starts from noise alone with probability ``noise_share`` ("max-time weighting"), else from y noised to the time of a later
step, so that one student serves 1 to 4 steps ("step-adaptive").

Departures are those of the two methods. The paper's student answers both losses from one batch of states at sCM's times;
here the adversary has states of the student's own schedules, which is what it will draw from.
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
    """The settings of both, with SANA-Sprint's defaults."""

    adversarial_weight: float = Field(0.5, gt=0, description="of the adversarial loss beside sCM's; without it: scm")
    noise_share: float = Field(
        0.5, ge=0, le=1, description="how often the adversary's pictures start from noise alone, at a first time"
    )


class Hybrid(SCM):
    """See the module's text."""

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
        x = self._sample(real, cond, step)
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
        """The student's pictures ``(B, ...)`` that the adversary judges."""
        noise = draw_noise(tuple(real.shape), step.local, real.device)
        student, schedules = self.student.denoiser, list(self.config.schedules.values())
        x_t, t = starting_states(real, noise, student.schedule, schedules, self.config.noise_share, step.local)
        return student(x_t, t, cond)
