"""SIM: Score Implicit Matching (Luo et al. 2024, https://arxiv.org/abs/2410.16794).

Like SiD (`distillers.methods.sid`) in turns and networks, with another distance d between the two scores (theorem 3.1):

    loss = -d'(F_S - F_T) . (F_S - x)        F_S, F_T at x_t, differentiated through both

where d is the pseudo-Huber distance with ``d'(y) = y / sqrt(mean y^2 + c^2)`` (eq. 3.9), so that the pull stays bounded
however far apart the scores are. The squared distance would be SiD with alpha = 1.

Departures: the scores are compared as x0 estimates, so that c is in units of the latents' standard deviation. Each
image's loss is divided by ``mean|x - F_T|`` only on request (``normalize``), since the pseudo-Huber bounds it already.
"""

from pydantic import Field
from torch import Tensor

from distillers.losses.score_identity import score_implicit_loss
from distillers.methods.score_distillation import Noised, ScoreDistillation
from distillers.methods.sid import ScoreIdentityConfig


class SIMConfig(ScoreIdentityConfig):
    """Settings of SIM."""

    normalize: bool = Field(False, description="divide each image's loss by mean|x - F_T|")
    huber: float = Field(0.1, gt=0, description="pseudo-Huber constant c, relative to the latents' standard deviation")


class SIM(ScoreDistillation):
    """See the module docstring."""

    name = "sim"
    Config = SIMConfig
    config: SIMConfig
    differentiates_scores = True

    def matching(self, seen: Noised) -> Tensor:
        return score_implicit_loss(
            seen.x, seen.fake_x0, seen.teacher_x0, self.config.huber, normalize=self.config.normalize
        )
