"""Adversarial losses on logits (larger means real), and an approximate R1 penalty.

The non-saturating GAN loss (https://arxiv.org/abs/1406.2661, section 3) is written with softplus, as in DMD2. The hinge
loss ignores logits beyond +-1 (https://arxiv.org/abs/1705.02894; https://arxiv.org/abs/1802.05957, eq. 16 and 17).
Approximate R1 (https://arxiv.org/abs/2501.08316, eq. 6) penalises the discriminator's gradient at real images,
estimated in one random direction instead of by a second backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST_GRADIENT = 1e-12


def generator_loss(fake_logits: Tensor) -> Tensor:
    """``mean softplus(-D(fake))``, for logits of any shape."""
    return F.softplus(-fake_logits.float()).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``mean softplus(D(fake)) + mean softplus(-D(real))``, for logits of any shape."""
    return F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()


def hinge_generator_loss(fake_logits: Tensor) -> Tensor:
    """``-mean D(fake)``, for logits of any shape."""
    return -fake_logits.float().mean()


def hinge_discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``mean max(0, 1 - D(real)) + mean max(0, 1 + D(fake))``, for logits of any shape."""
    return F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean()


def approximate_r1(logits: Tensor, disturbed_logits: Tensor) -> Tensor:
    """``mean (D(x) - D(x + s eps))^2`` at real x, about ``s^2 |dD/dx|^2``; the caller perturbs x, with s about 0.1."""
    return (logits.float() - disturbed_logits.float()).square().mean()


def relative_weight(reference: Tensor, loss: Tensor, x: Tensor) -> Tensor:
    """``|d reference / dx| / |d loss / dx|``: the weight that makes the gradient of a loss as large as a reference's.

    This is VQGAN's adaptive weight (https://arxiv.org/abs/2012.09841, eq. 7), at the images instead of the last layer.

    Args:
        reference: scalar, with a graph to x.
        loss: scalar, with a graph to x.
        x: of any shape.

    Returns:
        A scalar without a graph; both graphs are retained.
    """
    wanted, own = (torch.autograd.grad(each, x, retain_graph=True)[0].float().norm() for each in (reference, loss))
    weight: Tensor = wanted / own.clamp_min(SMALLEST_GRADIENT)
    return weight
