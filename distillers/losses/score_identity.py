r"""Score identity losses, whose gradient flows through both scores.

At one noise level, let q be the student's distribution, p the teacher's, and ``delta = score_q - score_p`` at a noised
student image x_t. The KL family moves x along delta itself (`distillers.losses.distribution_matching`); the losses here
minimise its magnitude. In x0 estimates, ``delta = alpha_t (F_S - F_T) / sigma_t^2``; factors that depend only on t are
omitted, as in that module.

SiD (Zhou et al. 2024, https://arxiv.org/abs/2404.04057, eq. 23):

    L = [(1 - a) |F_T - F_S|^2 + (F_T - F_S) . (F_S - x)] / mean|x - F_T|

Without the normalisation, a = 1/2 gives the gradient of the Fisher divergence ``E_q |delta|^2 / 2``, and a = 1 that of
the same with the distribution of x_t held fixed, which is SIM's. The paper's larger a, 1.2, is empirical. With weights,

    L = h [(1 - a) |F_T - F_S|^2 + (F_T - F_S) . (F_S - x)],    a = (1 + r h'(r) / h(r)) / 2,    r = p(x_t) / q(x_t)

has the gradient of ``E_q[h(r) |delta|^2] / 2``, whose integral over diffusion time is the f-divergence with
``h(r) = r^2 f''(r)`` (Uni-Instruct, Wang et al. 2025, https://arxiv.org/abs/2505.20755, theorem 3.1). It is the total
derivative: |delta|^2 changes with x_t, score_q with the student (SiD's projection), and h with both, where
``d_theta r = -r d_theta log q``. h and a are functions of x_t themselves; see `score_identity_loss`.

SIM (Luo et al. 2024, https://arxiv.org/abs/2410.16794, eq. 3.7) uses another distance d between the two scores:

    L = -d'(F_S - F_T) . (F_S - x),    d the pseudo-Huber sqrt(|y|^2 + c^2) - c,  or |y|^2 / 2: SiD's loss with a = 1
"""

from torch import Tensor

from distillers.losses.distribution_matching import SMALLEST_NORM, per_picture


def score_identity_loss(
    x: Tensor,
    fake_x0: Tensor,
    teacher_x0: Tensor,
    alpha: float | Tensor = 1.2,
    weight: Tensor | None = None,
    *,
    normalize: bool = True,
) -> Tensor:
    """SiD's loss: ``mean h [(1 - a) (F_T - F_S)^2 + (F_T - F_S)(F_S - x)] / mean|x - F_T|``.

    Args:
        x: student's images before noising, ``(B, ...)``, with a graph to the student.
        fake_x0: ``F_S(x_t)``, ``(B, ...)``, with a graph to x through x_t, but not to the fake score's weights.
        teacher_x0: ``F_T(x_t)``, likewise.
        alpha: a; a number, or ``(B,)``.
        weight: h, ``(B,)``; 1 when left out. If alpha and weight have a graph to x_t, they are differentiated too, as
            the total derivative of the weighted divergence requires.
        normalize: divide by ``mean|x - F_T|`` of each image, which receives no gradient.

    Returns:
        A scalar. It hovers around 0 and may be negative: it does not measure how good the student is.
    """
    x, fake_x0, teacher_x0 = x.float(), fake_x0.float(), teacher_x0.float()
    gap = teacher_x0 - fake_x0
    share = per_picture(alpha.float(), gap) if isinstance(alpha, Tensor) else alpha
    terms = gap * ((1 - share) * gap + (fake_x0 - x))
    return _weighted_mean(terms, x, teacher_x0, weight, normalize)


def score_implicit_loss(
    x: Tensor, fake_x0: Tensor, teacher_x0: Tensor, huber: float, *, normalize: bool = True
) -> Tensor:
    """SIM's loss under the pseudo-Huber distance: ``mean (F_T - F_S)(F_S - x) / sqrt(mean (F_T - F_S)^2 + c^2)``.

    Args:
        x: as in `score_identity_loss`, like the other tensors.
        fake_x0: ``(B, ...)``.
        teacher_x0: ``(B, ...)``.
        huber: c > 0, in units of the latents' standard deviation; for large c, this is the squared distance over c.
        normalize: divide by ``mean|x - F_T|`` of each image.
    """
    x, fake_x0, teacher_x0 = x.float(), fake_x0.float(), teacher_x0.float()
    gap = teacher_x0 - fake_x0
    size = (gap.square().flatten(1).mean(1) + huber**2).sqrt()
    return _weighted_mean(gap * (fake_x0 - x) / per_picture(size, gap), x, teacher_x0, None, normalize)


def _weighted_mean(terms: Tensor, x: Tensor, teacher_x0: Tensor, weight: Tensor | None, normalize: bool) -> Tensor:
    if normalize:
        size = (x - teacher_x0).detach().abs().flatten(1).mean(1).clamp_min(SMALLEST_NORM)
        terms = terms / per_picture(size, terms)
    if weight is not None:
        terms = terms * per_picture(weight.float(), terms)
    return terms.mean()
