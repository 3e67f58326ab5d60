r"""Continuous-time consistency in TrigFlow coordinates (Lu & Song 2024, https://arxiv.org/abs/2410.11081).

    x_t = cos(t) x_0 + sin(t) z,    z ~ N(0, sd^2),    t in (0, pi / 2)         (section 3, sd is sigma_data)
    f(x_t, t) = cos(t) x_t - sin(t) sd F(x_t, t)                                 (equation 5)

Here t is the angle, sd F is a velocity, dx_t / dt, and f is a denoiser's x_0 estimate. A consistency function is
constant along the teacher's trajectories, ``dx_t / dt = sd F_T``, so its derivative along them vanishes. Times cos(t),
it is

    g = cos(t) df/dt = -cos^2(t) (sd F - dx_t/dt) - r cos(t) sin(t) (x_t + d(sd F)/dt)        (equation 8, section 4.1)

where r rises from 0 to 1 during the warm-up; at r = 0, g points to the teacher's own velocity. The loss moves sd F
along g, and so f towards its own value a moment earlier:  ``|| F - sg(F^- + k g / (|g| + c)) ||^2``, where F^- is F
itself and k = 1 in the paper.
"""

import torch
from torch import Tensor

from distillers.losses.distribution_matching import per_picture


def trig_velocity(x0: Tensor, x_t: Tensor, angle: Tensor) -> Tensor:
    """``sd F = dx_t/dt = (cos(t) x_t - x_0) / sin(t)``, ``(B, ...)``; computed in float64, since sin(t) can be small.

    Args:
        x0: estimate at x_t, ``(B, ...)``.
        x_t: state, ``(B, ...)``.
        angle: t in (0, pi / 2], ``(B,)``.

    Returns:
        float64 if both ``x0`` and ``x_t`` are, else float32.
    """
    t = per_picture(angle.double(), x_t)
    velocity = (t.cos() * x_t.double() - x0.double()) / t.sin()
    return velocity if x0.dtype == x_t.dtype == torch.float64 else velocity.float()


def consistency_tangent(
    velocity: Tensor, teacher_velocity: Tensor, derivative: Tensor, x_t: Tensor, angle: Tensor, ramp: Tensor
) -> Tensor:
    """The tangent g; see the module docstring.

    Args:
        velocity: the student's sd F at x_t, ``(B, ...)``.
        teacher_velocity: dx_t/dt, ``(B, ...)``.
        derivative: d(sd F)/dt of the student along the teacher's trajectory, ``(B, ...)``.
        x_t: state, ``(B, ...)``.
        angle: t, ``(B,)``.
        ramp: r in [0, 1], ``(B,)``.

    Returns:
        ``(B, ...)`` without a graph, at least float32.
    """
    velocity, teacher_velocity, derivative, x_t = (
        tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        for tensor in (velocity, teacher_velocity, derivative, x_t)
    )
    cos, sin, r = (per_picture(value.to(x_t.dtype), x_t) for value in (angle.cos(), angle.sin(), ramp))
    return -cos.square() * (velocity - teacher_velocity) - r * cos * sin * (x_t + derivative)


def normalize_tangent(tangent: Tensor, offset: float = 0.1) -> Tensor:
    """``g / (|g| + c)`` for each image, where |g| is the root mean square over its elements.

    The paper's |g| is the norm, which grows with the number of elements (section 4.2). Public implementations since
    then divide it by the square root of that number, so that c and the loss have the same meaning in every latent
    space.
    """
    size = tangent.flatten(1).square().mean(dim=1).sqrt()
    return tangent / (per_picture(size, tangent) + offset)


def tangent_loss(velocity: Tensor, target: Tensor, weight: Tensor, log_variance: Tensor | None = None) -> Tensor:
    """``mean_B w e^{-u} mean (F - sg(target))^2 + u`` (algorithm 1, whose w is -u); its gradient at F is along F -
    target.

    Args:
        velocity: the student's F, with a graph, ``(B, ...)``.
        target: F^- plus a step along the normalised g, ``(B, ...)``.
        weight: w, ``(B,)``.
        log_variance: u, ``(B,)``, with a graph to the network that learns it; 0 when left out.
    """
    velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
    error = (velocity - target.detach()).square().flatten(1).mean(dim=1)
    if log_variance is None:
        return (weight * error).mean()
    return (weight * torch.exp(-log_variance) * error + log_variance).mean()
