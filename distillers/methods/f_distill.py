"""f-distill: distribution matching under any f-divergence (Xu et al. 2025, https://arxiv.org/abs/2502.15681).

DMD2 (`distillers.methods.dmd2`, whose networks, turns and losses these are) descends the reverse KL divergence, which
prefers few of the teacher's modes to a picture between them. Another divergence is the same gradient times ``h(r)``,
picture by picture, where r = p / q is how much likelier the teacher's distribution makes the noised picture than the
student's:

    student     grad_x = h(r) (F_S(x_t) - F_T(x_t)) / mean|x - F_T(x_t)|,    r = e^{D(x_t)}

D, DMD2's discriminator, looks at the score losses' own noised pictures (``share_times``), so that r is theirs. As in the
public code r is divided by a moving average of its own, kept for each of ``ratio_bins`` intervals of t, and held within
``ratio_range``; h is divided by its batch mean. The reverse KL's h is 1: with it, this is DMD2.
"""

from torch import Tensor

from distillers.losses.divergences import divergence_weight
from distillers.methods.dmd2 import DMD2, DMD2Config
from distillers.methods.score_distillation import Noised
from distillers.ratios import RatioConfig, WithRatios


class FDistillConfig(RatioConfig, DMD2Config):
    """DMD2's settings, and the divergence's."""


class FDistill(WithRatios, DMD2):
    """See the module's text."""

    name = "f_distill"
    Config = FDistillConfig
    config: FDistillConfig

    def weight(self, seen: Noised) -> Tensor:
        ratio = self.ratios(seen.logits, seen.t).detach()
        weight = divergence_weight(self.config.divergence, ratio)
        return weight / weight.mean() if self.config.normalize_weights else weight
