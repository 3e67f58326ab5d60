"""A denoiser in another schedule: a denoiser that wraps a denoiser.

Two schedules at equal SNR differ by the scale of the state alone (`weights.diffusion.schedules.convert`), so that what a
network learned in its own schedule, whatever it predicts there, answers in any other without training (Lu & Song 2024,
https://arxiv.org/abs/2410.11081, appendix B.1; Chen et al. 2025, https://arxiv.org/abs/2503.09641, section 3.1):

    D'(x_t, t) = D(k x_t, t'),    alpha_{t'} / sigma_{t'} = alpha'_t / sigma'_t,    k = alpha_{t'} / alpha'_t
"""

from torch import Tensor

from weights.denoiser import Cond, Denoiser
from weights.diffusion.schedules import Schedule, convert


class Converted(Denoiser):
    """``denoiser``, asked in ``schedule`` in place of its own. Differentiable in x_t and t, forwards and backwards.

    Times that its own schedule never reaches are its nearest end there, as in `convert`.
    """

    def __init__(self, denoiser: Denoiser, schedule: Schedule) -> None:
        super().__init__()
        self.denoiser, self.schedule = denoiser, schedule

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The estimate of x_0; shapes as in `Denoiser.forward`."""
        x0: Tensor = self.denoiser(*convert(x_t, t, self.schedule, self.denoiser.schedule), cond)
        return x0
