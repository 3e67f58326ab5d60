"""SiD: Score identity Distillation (Zhou et al. 2024, https://arxiv.org/abs/2404.04057).

Of the score distillation family (`distillers.methods.score_distillation`): student and fake score step in turn, and the
student's loss is differentiated through both scores (eq. 23; see `distillers.losses.score_identity` for what it means):

    loss = [(1 - alpha) |F_T - F_S|^2 + (F_T - F_S) . (F_S - x)] / mean|x - F_T|        F_T, F_S at x_t

alpha = 1.2 is the paper's choice on its benchmarks (1.0 on AFHQ); elsewhere 0.5 to 1.0 is worth trying: at 0.5 the gradient
is that of the Fisher divergence itself. The loss hovers about 0 whatever the student is worth: watch ``student/score_gap``.

Departures: the loss is a mean where the public code has a sum times 100, a factor that Adam does not see; the paper's
generator is fed noise of standard deviation 2.5 in EDM's units, here what a student is fed is its step schedule's matter;
times are uniform on the schedule. A discriminator may be switched on (``gan_weight``: then it is much like SiDA).
"""

from pydantic import Field
from torch import Tensor

from distillers.losses.score_identity import score_identity_loss
from distillers.methods.score_distillation import Noised, ScoreDistillation
from distillers.methods.score_settings import TurnAboutConfig


class ScoreIdentityConfig(TurnAboutConfig):
    """The family's settings with the defaults of SiD's paper."""

    normalize: bool = Field(True, description="divide each picture's loss by mean|x - F_T|")


class SiDConfig(ScoreIdentityConfig):
    """SiD's settings."""

    alpha: float = Field(1.2, ge=0, le=2, description="how much of |F_T - F_S|^2 is taken back; 0.5 to 1.2 in use")


class SiD(ScoreDistillation):
    """See the module's text."""

    name = "sid"
    Config = SiDConfig
    config: SiDConfig
    differentiates_scores = True

    def matching(self, seen: Noised) -> Tensor:
        return score_identity_loss(
            seen.x, seen.fake_x0, seen.teacher_x0, self.config.alpha, normalize=self.config.normalize
        )
