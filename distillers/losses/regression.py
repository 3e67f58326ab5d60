"""Regression of the student on pairs of noise and the picture that the teacher's ODE solver makes of it.

DMD (https://arxiv.org/abs/2311.18828, eq. 9) kept such a loss throughout; DMD2 drops it, but starts SDXL's one-step
student with a short stage of it (appendix, 'one-step SDXL').
"""

import torch
from torch import Tensor


def regression_loss(x0_estimate: Tensor, target: Tensor, huber: float = 0.0) -> Tensor:
    """``mean (x0 - target)^2``, or the pseudo-Huber ``mean sqrt(d^2 + c^2) - c`` where ``huber = c > 0``.

    Args:
        x0_estimate: ``(B, ...)``.
        target: ``(B, ...)``, gets no gradient.
        huber: c, in units of the latents' standard deviation; 0 is the plain square.
    """
    error = (x0_estimate.float() - target.detach().float()).square()
    if huber > 0:
        return (torch.sqrt(error + huber**2) - huber).mean()
    return error.mean()
