"""Diff-Instruct: the integral KL divergence, and nothing else (Luo et al. 2023, https://arxiv.org/abs/2305.18455).

DMD2 without its discriminator, its normalisation and its pace: of the family (`distillers.methods.score_distillation`), the
student's picture x moves along the plain difference of the two scores (theorem 3.1, in x0 estimates),

    grad_x = F_S(x_t) - F_T(x_t),    ln(sigma_t / alpha_t) ~ N(ln 2 - 1.2, 1.2^2)

and student and fake score step in turn. The paper's mean is -1.2, for data of standard deviation 0.5; latents have unit
variance here, and as much of them is left under twice the noise. The weight of a time is what the difference of x0
estimates leaves of the paper's w(t): ``grad_x`` is ``sigma_t^2 / alpha_t (score_p - score_q)``, negated.

Departures: the public code feeds its one-step generator noise of standard deviation 1 in EDM's units; here what a student
is fed is its step schedule's matter, and pure noise unless that says otherwise. A discriminator may be switched on
(``gan_weight``), as everywhere in the family.
"""

from pydantic import Field
from torch import Tensor

from distillers.losses.distribution_matching import distribution_matching_gradient, gradient_as_loss
from distillers.methods.score_distillation import Noised, ScoreDistillation
from distillers.methods.score_settings import Interval, TurnAboutConfig


class DiffInstructConfig(TurnAboutConfig):
    """The family's settings with the paper's defaults."""

    dm_levels: Interval | None = Field(
        (-0.507, 1.2), description="(mean, std) of a normal ln(sigma / alpha); dm_times, uniform, when null"
    )


class DiffInstruct(ScoreDistillation):
    """See the module's text."""

    name = "diff_instruct"
    Config = DiffInstructConfig

    def matching(self, seen: Noised) -> Tensor:
        gradient = distribution_matching_gradient(seen.x, seen.fake_x0, seen.teacher_x0, normalize=False)
        return gradient_as_loss(seen.x, gradient)
