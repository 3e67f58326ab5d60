"""Uni-Instruct: any f-divergence, expanded over the diffusion (Wang et al. 2025, https://arxiv.org/abs/2505.20755).

An f-divergence between clean distributions is an integral of weighted Fisher divergences over noise levels (theorem
3.1): ``integral of g^2 / 2 E_q[h(r) |score_q - score_p|^2] dt`` with ``h(r) = r^2 f''(r)`` and r = p / q. Its gradient
is that of SiD's loss (`distillers.methods.sid`) with a weight and an alpha that depend on r
(`distillers.losses.score_identity`):

    loss = h(r) [(1 - a) |F_T - F_S|^2 + (F_T - F_S) . (F_S - x)] / mean|x - F_T|,    a = (1 + r h'(r) / h(r)) / 2

r = e^{D(x_t)} comes from the discriminator, as in `distillers.methods.f_distill`. The reverse KL has h = 1, a = 1/2.

Departures: the paper splits the gradient into a term like Diff-Instruct's and one like SIM's, with r outside the graph.
The form above is the total derivative in one term, verified by quadrature. It needs the gradient of r with respect to
x_t, which ``ratio_gradient = false`` drops. Times and normalisation are SiD's.
"""

from pydantic import Field
from torch import Tensor

from distillers.losses.divergences import Divergence, weight_elasticity
from distillers.losses.score_identity import score_identity_loss
from distillers.methods.score_distillation import Noised
from distillers.methods.sid import ScoreIdentityConfig
from distillers.ratios import RatioConfig, WithRatios


class UniInstructConfig(RatioConfig, ScoreIdentityConfig):
    """Settings of Uni-Instruct: SiD's, and those of the divergence."""

    divergence: Divergence = Field(
        "forward_kl", description="f-divergence to minimise: a name, or (a, b) of h(r) = r^a (1 + r)^b"
    )
    gan_weight: float = Field(
        1e-3, gt=0, description="weight of the student's adversarial loss; its discriminator provides the ratios"
    )
    ratio_gradient: bool = Field(
        True, description="also differentiate the ratios with respect to the images, as in theory"
    )


class UniInstruct(WithRatios):
    """See the module docstring."""

    name = "uni_instruct"
    Config = UniInstructConfig
    config: UniInstructConfig
    differentiates_scores = True

    def matching(self, seen: Noised) -> Tensor:
        config = self.config
        ratio = self.ratios(seen.logits, seen.t)
        if not config.ratio_gradient:
            ratio = ratio.detach()
        weight = self.ratios.weights(ratio)
        alpha = (1 + weight_elasticity(config.divergence, ratio)) / 2
        return score_identity_loss(seen.x, seen.fake_x0, seen.teacher_x0, alpha, weight, normalize=config.normalize)
