"""Evaluation of a denoiser in another noise schedule, by a wrapper around it.

At equal SNR, the states of two schedules differ only in scale (`weights.diffusion.schedules.convert`). A network can
therefore be evaluated in a schedule other than its own without retraining, whatever it predicts (Lu & Song 2024,
https://arxiv.org/abs/2410.11081, appendix B.1; Chen et al. 2025, https://arxiv.org/abs/2503.09641, section 3.1). With
D, alpha and sigma in the network's own schedule, and D', alpha' and sigma' in the new one:

    D'(x_t, t) = D(k x_t, t'),    alpha_{t'} / sigma_{t'} = alpha'_t / sigma'_t,    k = alpha_{t'} / alpha'_t
"""

from torch import Tensor

from weights.denoiser import Cond, Denoiser
from weights.diffusion.schedules import Schedule, convert


class Converted(Denoiser):
    """``denoiser``, evaluated in ``schedule`` instead of its own.

    Differentiable in x_t and t, in forward and reverse mode. SNRs that the denoiser's own schedule never reaches map to
    its nearest end, as in `convert`.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    @property
    def embeds_guidance(self) -> bool:
        return self.denoiser.embeds_guidance

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The estimate of x_0; shapes as in `Denoiser.forward`."""
        x0: Tensor = self.denoiser(*convert(x_t, t, self.schedule, self.denoiser.schedule), cond)
        return x0
