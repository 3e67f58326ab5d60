"""Denoising score matching: a network learns the score of the distribution that its training images come from.

Every weighting is written for an x0 estimate, since denoisers return x0. For a given ``x_t = alpha_t x_0 + sigma_t
eps``, the squared errors of the other predictions are multiples of the squared x0 error:

    eps:  alpha^2 / sigma^2                        (DDPM's simple loss, with which DMD2 trains its fake score)
    v:    (alpha^2 / sigma + sigma)^2              (1 / sigma^2 where alpha^2 + sigma^2 = 1)
    flow: (alpha / sigma + 1)^2                    (1 / sigma^2 where alpha + sigma = 1)
    edm:  sigma'^-2 + sigma_data^-2, sigma' = sigma / alpha    (https://arxiv.org/abs/2206.00364, table 1)
    x0:   1
"""

from typing import Literal

import torch
from torch import Tensor

from distillers.losses.distribution_matching import per_picture

Weighting = Literal["eps", "v", "flow", "edm", "x0"]
SMALLEST_SIGMA = 1e-4


def score_weight(alpha_t: Tensor, sigma_t: Tensor, weighting: Weighting, sigma_data: float = 1.0) -> Tensor:
    """The factor that turns the squared x0 error into the squared error of the prediction named by ``weighting``.

    Args:
        alpha_t: ``(B,)``.
        sigma_t: ``(B,)``; clamped to at least 1e-4, below which weights would explode.
        weighting: see the module docstring.
        sigma_data: standard deviation of the data, for ``edm``.

    Returns:
        ``(B,)`` float32.

    Raises:
        ValueError: the weighting is unknown.
    """
    alpha, sigma = alpha_t.double(), sigma_t.double().clamp_min(SMALLEST_SIGMA)
    match weighting:
        case "eps":
            weight = (alpha / sigma).square()
        case "v":
            weight = (alpha.square() / sigma + sigma).square()
        case "flow":
            weight = (alpha / sigma + 1).square()
        case "edm":
            weight = (alpha / sigma).square() + sigma_data**-2
        case "x0":
            weight = torch.ones_like(alpha)
        case _:
            raise ValueError(f"unknown weighting {weighting!r}: use 'eps', 'v', 'flow', 'edm' or 'x0'")
    return weight.float()


def denoising_loss(x0_estimate: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """``mean_B weight * mean (x0_estimate - x0)^2``; ``x0`` receives no gradient.

    Args:
        x0_estimate: ``(B, ...)``.
        x0: the clean images, ``(B, ...)``.
        weight: ``(B,)``.
    """
    error = (x0_estimate.float() - x0.detach().float()).square()
    return (per_picture(weight, error) * error).mean()
