"""SiD: Score identity Distillation (Zhou et al. 2024, https://arxiv.org/abs/2404.04057).

A member of the score distillation family (`distillers.methods.score_distillation`): student and fake score are updated
alternately, and the student's loss is differentiated through both scores (eq. 23; derivation in
`distillers.losses.score_identity`):

    loss = [(1 - alpha) |F_T - F_S|^2 + (F_T - F_S) . (F_S - x)] / mean|x - F_T|        F_T, F_S at x_t

The paper uses alpha = 1.2 on its benchmarks (1.0 on AFHQ); elsewhere 0.5 to 1.0 is worth trying. At 0.5 the gradient is
exactly that of the Fisher divergence. The loss hovers around 0 however good the student is: watch
``student/score_gap``.

Departures: the loss is a mean, where the public code has a sum times 100, a factor to which Adam is invariant. The
paper's generator starts from noise of standard deviation 2.5 in EDM's units; here the step schedule decides what the
student starts from. Times are uniform on the schedule, for the fake score too, whose ln sigma the public code draws
from N(-1.2, 1.2^2) (``score_levels = [-0.507, 1.2]``, for latents of unit variance). A discriminator can be enabled
(``gan_weight``), which makes this similar to SiDA.
"""

from pydantic import Field
from torch import Tensor

from distillers.losses.score_identity import score_identity_loss
from distillers.methods.score_distillation import Noised, ScoreDistillation
from distillers.methods.score_settings import TurnAboutConfig


class ScoreIdentityConfig(TurnAboutConfig):
    """Settings of the family, with the defaults of SiD's paper."""

    normalize: bool = Field(True, description="divide each image's loss by mean|x - F_T|")


class SiDConfig(ScoreIdentityConfig):
    """Settings of SiD."""

    alpha: float = Field(
        1.2, ge=0, le=2, description="in the loss's term (1 - alpha) |F_T - F_S|^2; 0.5 to 1.2 are usual"
    )


class SiD(ScoreDistillation):
    """See the module docstring."""

    name = "sid"
    Config = SiDConfig
    config: SiDConfig
    differentiates_scores = True

    def matching(self, seen: Noised) -> Tensor:
        return score_identity_loss(
            seen.x, seen.fake_x0, seen.teacher_x0, self.config.alpha, normalize=self.config.normalize
        )
