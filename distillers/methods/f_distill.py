"""f-distill: distribution matching under any f-divergence (Xu et al. 2025, https://arxiv.org/abs/2502.15681).

DMD2 (`distillers.methods.dmd2`, whose networks, turns and losses are used here) minimises the reverse KL divergence,
which is mode-seeking: it drops modes of the teacher rather than generate images between them. For any other
f-divergence, the gradient of each image is multiplied by ``h(r)``, where r = p / q is the density ratio of teacher to
student at the noised image:

    student     grad_x = h(r) (F_S(x_t) - F_T(x_t)) / mean|x - F_T(x_t)|,    r = e^{D(x_t)}

D is DMD2's discriminator. It sees the same noised images as the score losses (``share_times``), so that r applies to
them. As in the public code, r is divided by its moving average in each of ``ratio_bins`` intervals of t, then clamped
to ``ratio_range``. For the reverse KL, h is 1 and this is DMD2.

Departures: h is divided by a moving average too, where the public code divides it by its mean over the batch. The mean
of few images follows each of them and so hides part of the divergence, and accumulated micro-batches would each have
their own. Both averages are those of earlier steps, so that a batch may be divided in any way.
"""

from torch import Tensor

from distillers.methods.dmd2 import DMD2, DMD2Config
from distillers.methods.score_distillation import Noised
from distillers.ratios import RatioConfig, WithRatios


class FDistillConfig(RatioConfig, DMD2Config):
    """Settings of f-distill: DMD2's, and those of the divergence."""


class FDistill(WithRatios, DMD2):
    """See the module docstring."""

    name = "f_distill"
    Config = FDistillConfig
    config: FDistillConfig

    def weight(self, seen: Noised) -> Tensor:
        ratio = self.ratios(seen.logits, seen.t).detach()
        return self.ratios.weights(ratio)
