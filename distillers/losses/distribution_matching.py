"""Distribution matching: the student follows the difference of two scores.

For the student's image ``x = G(z)``, noised to ``x_t = alpha_t x + sigma_t eps``, the gradient of the reverse KL
divergence between the student's and the teacher's distributions at t is, up to a factor that depends only on t,

    grad = F_S(x_t) - F_T(x_t)        (x0 estimates: F_S of the student's distribution, F_T of the teacher's)

because ``score = (alpha_t F - x_t) / sigma_t^2``. DMD (https://arxiv.org/abs/2311.18828, eq. 7-8) divides it by
``mean |x - F_T|`` for each image, which makes its magnitude independent of t; DMD2 (https://arxiv.org/abs/2405.14867)
does the same.
"""

import torch
from torch import Tensor

SMALLEST_NORM = 1e-6


def per_picture(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes ``(B,)`` to broadcast over ``like: (B, ...)``."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def distribution_matching_gradient(
    x: Tensor, fake_x0: Tensor, teacher_x0: Tensor, weight: Tensor | None = None, *, normalize: bool = True
) -> Tensor:
    """``h (F_S - F_T) / mean|x - F_T|``: x moves against this gradient, towards the teacher's distribution.

    Args:
        x: student's images before noising, ``(B, ...)``.
        fake_x0: fake score's x0 estimate ``F_S(x_t)``, ``(B, ...)``.
        teacher_x0: teacher's x0 estimate ``F_T(x_t)``, guided or not, ``(B, ...)``.
        weight: the h(r) of another f-divergence, ``(B,)``; 1 (the reverse KL) when left out.
        normalize: divide by ``mean|x - F_T|`` of each image.

    Returns:
        ``(B, ...)`` float32, without a graph; non-finite values are replaced by zero, as in DMD's public code.
    """
    x, fake_x0, teacher_x0 = (tensor.detach().float() for tensor in (x, fake_x0, teacher_x0))
    gradient = fake_x0 - teacher_x0
    if normalize:
        size = (x - teacher_x0).abs().flatten(1).mean(dim=1).clamp_min(SMALLEST_NORM)
        gradient = gradient / per_picture(size, gradient)
    if weight is not None:
        gradient = gradient * per_picture(weight.detach().float(), gradient)
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def gradient_as_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """``0.5 mean (x - sg(x - gradient))^2``, whose derivative with respect to x is ``gradient / x.numel()``.

    Args:
        x: ``(B, ...)``, with a graph to the student.
        gradient: ``(B, ...)``.
    """
    x = x.float()
    target = (x - gradient).detach()
    return 0.5 * (x - target).square().mean()
