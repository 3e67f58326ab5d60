"""Regression on pairs of noise and the image that the teacher's ODE solver generates from it.

DMD (https://arxiv.org/abs/2311.18828, eq. 9) uses such a loss throughout. DMD2 drops it, but starts SDXL's one-step
student with a short regression stage (appendix, 'one-step SDXL').
"""

import torch
from torch import Tensor


def regression_loss(x0_estimate: Tensor, target: Tensor, huber: float = 0.0) -> Tensor:
    """``mean (x0 - target)^2``, or the pseudo-Huber ``mean sqrt(d^2 + c^2) - c`` if ``huber = c > 0``.

    Args:
        x0_estimate: ``(B, ...)``.
        target: ``(B, ...)``; receives no gradient.
        huber: c, in units of the latents' standard deviation; 0 for the squared error.
    """
    error = (x0_estimate.float() - target.detach().float()).square()
    if huber > 0:
        return (torch.sqrt(error + huber**2) - huber).mean()
    return error.mean()
