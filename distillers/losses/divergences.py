r"""f-divergences as weights on a common gradient.

For ``D_f(p || q) = E_q[f(p / q)]`` between the teacher's distribution p and the student's q, at one noise level,

    d D_f / d theta = E_q[ h(r) (score_q - score_p) . dx_t / d theta ],    r = p(x_t) / q(x_t),    h(r) = r^2 f''(r)

(Xu et al. 2025, https://arxiv.org/abs/2502.15681, theorem 1): the gradient of every f-divergence is that of the reverse
KL, whose h is 1, times a weight. r comes from the logits of a discriminator, whose optimum is ``log r``. If h grows
with r (forward KL), the divergence is mode-covering; if it does not (reverse KL, Neyman), it is mode-seeking. Constant
factors are omitted.

The weights of the usual divergences all have the form ``h(r) = r^a (1 + r)^b``, so that a divergence is given by its
name or by its (a, b). Not every f has such an h: a skewed Jensen-Shannon divergence, with ``h(r) = r / (1 - s + s r)``,
does not unless s = 1/2, and total variation, whose f has no second derivative, has no h at all. To add a divergence of
another form, give it a name in `DivergenceName`, and its h and ``r h'(r) / h(r)`` in `divergence_weight` and
`weight_elasticity`, which are all that methods use.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

DivergenceName = Literal[
    "reverse_kl",
    "softened_reverse_kl",
    "jensen_shannon",
    "squared_hellinger",
    "forward_kl",
    "jeffreys",
    "neyman_chi2",
    "pearson_chi2",
]
Divergence = DivergenceName | tuple[float, float]

DIVERGENCES: dict[DivergenceName, tuple[float, float]] = {
    "reverse_kl": (0.0, 0.0),
    "softened_reverse_kl": (0.0, -1.0),
    "jensen_shannon": (1.0, -1.0),
    "squared_hellinger": (0.5, 0.0),
    "forward_kl": (1.0, 0.0),
    "jeffreys": (0.0, 1.0),
    "neyman_chi2": (-1.0, 0.0),
    "pearson_chi2": (2.0, 0.0),
}
"""(a, b) of each divergence."""

LARGEST_LOGIT = 10.0


def powers(divergence: Divergence) -> tuple[float, float]:
    """Returns (a, b) of ``h(r) = r^a (1 + r)^b``.

    Raises:
        ValueError: there is no divergence with that name.
    """
    if isinstance(divergence, tuple):
        return divergence
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"{divergence!r} is not a divergence: use one of {', '.join(get_args(DivergenceName))}, or (a, b)"
        )
    return DIVERGENCES[divergence]


def divergence_weight(divergence: Divergence, ratio: Tensor) -> Tensor:
    """``h(r)``, ``(B,)``.

    Args:
        divergence: a name in `DIVERGENCES`, or (a, b).
        ratio: r, positive, ``(B,)``.
    """
    a, b = powers(divergence)
    return ratio**a * (1 + ratio) ** b


def weight_elasticity(divergence: Divergence, ratio: Tensor) -> Tensor:
    """``r h'(r) / h(r) = a + b r / (1 + r)``, ``(B,)``; same arguments as `divergence_weight`."""
    a, b = powers(divergence)
    return a + b * ratio / (1 + ratio)


def density_ratio(logits: Tensor) -> Tensor:
    """``r = e^logit`` of each image, ``(B,)`` float32, from the mean logit over heads, clamped to +-10.

    Args:
        logits: ``(B, heads)``; larger means real.
    """
    return torch.exp(logits.float().flatten(1).mean(dim=1).clamp(-LARGEST_LOGIT, LARGEST_LOGIT))
